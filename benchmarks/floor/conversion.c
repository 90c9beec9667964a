/*
 * Time the necessary work of conversions: conversion kernel|software SIZE TOUCHES
 *
 * Both halves of SIZE bytes have all their pages, and the guest has mapped them.
 * Then, in steps of 2 MiB, the program first converts all private memory to
 * shared, then all shared memory to private.  Each step punches the half that
 * the guest leaves, and touches TOUCHES pages of the other half.  Prints the
 * nanoseconds of the conversion to shared and of the one to private.
 *
 * kernel: the private half is a guest_memfd, and a guest on /dev/kvm makes the
 * touches.  The guest runs at CPL3, with page tables of 4 KiB pages.  It ends a
 * step with OUT, which the I/O permission bitmap allows.
 * software: both halves are memfds mapped here, and this program touches them.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* From <linux/kvm.h>, under other names: many systems have an older header. */
#define SLOT_GUEST_MEMFD	(1U << 2)
#define MEMFD_MMAP		(1UL << 0)

struct slot2 {
	uint32_t number, flags;
	uint64_t guest_phys_addr, memory_size, userspace_addr, guest_memfd_offset;
	uint32_t guest_memfd, pad1;
	uint64_t pad2[14];
};

struct new_memfd {
	uint64_t size, flags, reserved[6];
};

#define SET_SLOT2	_IOW(KVMIO, 0x49, struct slot2)
#define NEW_MEMFD	_IOWR(KVMIO, 0xd4, struct new_memfd)

#define STEP	(2L << 20)
#define PAGE	4096L
/* Guest physical and linear addresses. */
#define SYSTEM	0L
#define SHARED	(8L << 30)
#define PRIVATE	(16L << 30)
/* Pages of the system's memory: code, TSS and bitmap, then page tables. */
#define CODE	0
#define TSS	PAGE
#define TABLES	(8 * PAGE)

static char *system_memory;
static long next_table = TABLES;
static struct kvm_run *run;
static int vcpu;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000L + time.tv_nsec;
}

static void map(long linear)
{
	long table = TABLES;

	for (int shift = 39; shift >= 12; shift -= 9) {
		uint64_t *entry = (uint64_t *)(system_memory + table) + (linear >> shift & 511);

		if (shift == 12)
			*entry = linear | 0x67;
		else if (!*entry)
			*entry = (next_table += PAGE) | 7;
		table = *entry & ~(PAGE - 1);
	}
}

static void slot(int vm, int number, long at, long size, void *address, int memfd)
{
	struct slot2 region = {
		.number = number,
		.flags = memfd < 0 ? 0 : SLOT_GUEST_MEMFD,
		.guest_phys_addr = at,
		.memory_size = size,
		.userspace_addr = (uint64_t)address,
		.guest_memfd = memfd,
	};

	if (ioctl(vm, SET_SLOT2, &region))
		die("KVM_SET_USER_MEMORY_REGION2");
}

static void start_guest(int kvm, int vm, long size)
{
	/* out %al, $0xf4; touch: movb $1, (%rdi); add $4096, %rdi; dec %ecx; jnz touch; jmp out */
	static const unsigned char code[] = {
		0xe6, 0xf4, 0xc6, 0x07, 0x01, 0x48, 0x81, 0xc7, 0,
		0x10, 0, 0, 0xff, 0xc9, 0x75, 0xf2, 0xeb, 0xee,
	};
	struct kvm_segment text = { .limit = -1, .selector = 0x23, .type = 11,
				    .present = 1, .dpl = 3, .s = 1, .l = 1, .g = 1 };
	struct kvm_segment data = { .limit = -1, .selector = 0x1b, .type = 3,
				    .present = 1, .dpl = 3, .db = 1, .s = 1, .g = 1 };
	struct kvm_segment task = { .base = TSS, .limit = 0x68 + 8192, .selector = 0x28,
				    .type = 11, .present = 1 };
	struct kvm_regs regs = { .rflags = 2 };
	struct kvm_sregs sregs;

	memcpy(system_memory + CODE, code, sizeof code);
	*(uint16_t *)(system_memory + TSS + 0x66) = 0x68;
	for (long at = 0; at < TABLES; at += PAGE)
		map(at);
	for (long at = 0; at < size; at += PAGE) {
		map(SHARED + at);
		map(PRIVATE + at);
	}
	vcpu = ioctl(vm, KVM_CREATE_VCPU, 0);
	if (vcpu < 0 || ioctl(vcpu, KVM_GET_SREGS, &sregs))
		die("KVM_CREATE_VCPU");
	run = mmap(NULL, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE,
		   MAP_SHARED, vcpu, 0);
	sregs.cs = text;
	sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
	sregs.tr = task;
	sregs.cr0 = 0x80010033;
	sregs.cr3 = TABLES;
	sregs.cr4 = 0x620;
	sregs.efer = 0x500;
	if (run == MAP_FAILED || ioctl(vcpu, KVM_SET_SREGS, &sregs) || ioctl(vcpu, KVM_SET_REGS, &regs))
		die("KVM_SET_SREGS");
	run->kvm_valid_regs = KVM_SYNC_X86_REGS;
	if (ioctl(vcpu, KVM_RUN, 0) || run->exit_reason != KVM_EXIT_IO)
		die("KVM_RUN");
}

static void guest_touch(long at, long pages)
{
	run->s.regs.regs.rdi = at;
	run->s.regs.regs.rcx = pages;
	run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
	if (ioctl(vcpu, KVM_RUN, 0) || run->exit_reason != KVM_EXIT_IO) {
		fprintf(stderr, "KVM_RUN: exit %d\n", run->exit_reason);
		exit(1);
	}
}

static char *halves[2];

static void touch(int guest, int private, long offset, long pages)
{
	if (guest)
		guest_touch((private ? PRIVATE : SHARED) + offset, pages);
	else
		for (long page = 0; page < pages; page++)
			*(volatile char *)(halves[private] + offset + page * PAGE) = 1;
}

int main(int argc, char **argv)
{
	int guest = argc == 4 && !strcmp(argv[1], "kernel");
	long size = argc == 4 ? atol(argv[2]) : 0, pages = argc == 4 ? atol(argv[3]) : 0;
	int files[2];

	if (size <= 0 || size % STEP || pages <= 0 || pages > STEP / PAGE) {
		fprintf(stderr, "usage: conversion kernel|software SIZE TOUCHES\n");
		return 2;
	}
	for (int i = 0; i < 2; i++) {
		files[i] = memfd_create("floor", MFD_CLOEXEC);
		if (files[i] < 0 || ftruncate(files[i], size))
			die("memfd");
		halves[i] = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, files[i], 0);
		if (halves[i] == MAP_FAILED)
			die("mmap");
	}
	if (guest) {
		int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC), vm = ioctl(kvm, KVM_CREATE_VM, 0);
		struct new_memfd create = { .size = size, .flags = MEMFD_MMAP };
		long room = TABLES + 16 * PAGE + 2 * (size >> 9) + 64 * PAGE;

		if (vm < 0)
			die("KVM_CREATE_VM");
		files[1] = ioctl(vm, NEW_MEMFD, &create);
		if (files[1] < 0)
			die("KVM_CREATE_GUEST_MEMFD");
		system_memory = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		slot(vm, 0, SYSTEM, room, system_memory, -1);
		slot(vm, 1, SHARED, size, halves[0], -1);
		slot(vm, 2, PRIVATE, size, NULL, files[1]);
		start_guest(kvm, vm, size);
	}
	for (int private = 0; private < 2; private++) {
		long began;

		for (long offset = 0; offset < size; offset += STEP)
			touch(guest, !private, offset, STEP / PAGE);
		began = now();
		for (long offset = 0; offset < size; offset += STEP) {
			if (fallocate(files[!private], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, STEP))
				die("fallocate");
			touch(guest, private, offset, pages);
		}
		printf("%ld\n", now() - began);
	}
	return 0;
}
