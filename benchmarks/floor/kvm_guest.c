/*
 * Time a guest that writes to a port for ever: kvm_guest exits|machines COUNT
 *
 * exits: makes one such guest, and prints the nanoseconds of COUNT exits and
 * re-entries.
 * machines: prints the nanoseconds of COUNT VMs.  For each it opens /dev/kvm,
 * makes a VM, a slot on memory of this process, one on a guest_memfd and a
 * vCPU, runs to the first exit, and closes all of it again.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#ifndef KVM_CREATE_GUEST_MEMFD
#define KVM_MEM_GUEST_MEMFD (1UL << 2)

struct kvm_create_guest_memfd {
	__u64 size;
	__u64 flags;
	__u64 reserved[6];
};

struct kvm_userspace_memory_region2 {
	__u32 slot;
	__u32 flags;
	__u64 guest_phys_addr;
	__u64 memory_size;
	__u64 userspace_addr;
	__u64 guest_memfd_offset;
	__u32 guest_memfd;
	__u32 pad1;
	__u64 pad2[14];
};

#define KVM_SET_USER_MEMORY_REGION2 _IOW(KVMIO, 0x49, struct kvm_userspace_memory_region2)
#define KVM_CREATE_GUEST_MEMFD _IOWR(KVMIO, 0xd4, struct kvm_create_guest_memfd)
#endif

#define CODE 0x1000UL
#define PRIVATE_BASE 0x100000000UL
#define PRIVATE_SIZE 0x100000UL

struct machine {
	int kvm, vm, memfd, vcpu;
	long mapped;
	void *memory;
	struct kvm_run *run;
};

static int check(const char *call, int result)
{
	if (result < 0) {
		perror(call);
		exit(1);
	}
	return result;
}

static struct machine make(void)
{
	/* out 0x42, al; jmp back to it */
	static const unsigned char code[] = { 0xe6, 0x42, 0xeb, 0xfc };
	struct kvm_create_guest_memfd asked = { .size = PRIVATE_SIZE };
	struct kvm_regs regs = { .rip = CODE, .rflags = 2 };
	struct kvm_sregs sregs;
	struct machine m;

	m.kvm = check("/dev/kvm", open("/dev/kvm", O_RDWR | O_CLOEXEC));
	m.mapped = check("KVM_GET_VCPU_MMAP_SIZE", ioctl(m.kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	m.vm = check("KVM_CREATE_VM", ioctl(m.kvm, KVM_CREATE_VM, 0));
	m.memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	memcpy(m.memory, code, sizeof code);
	check("KVM_SET_USER_MEMORY_REGION",
	      ioctl(m.vm, KVM_SET_USER_MEMORY_REGION, &(struct kvm_userspace_memory_region){
		.slot = 0, .guest_phys_addr = CODE, .memory_size = 4096,
		.userspace_addr = (unsigned long)m.memory }));
	m.memfd = check("KVM_CREATE_GUEST_MEMFD", ioctl(m.vm, KVM_CREATE_GUEST_MEMFD, &asked));
	check("fcntl", fcntl(m.memfd, F_SETFD, FD_CLOEXEC));
	check("KVM_SET_USER_MEMORY_REGION2",
	      ioctl(m.vm, KVM_SET_USER_MEMORY_REGION2, &(struct kvm_userspace_memory_region2){
		.slot = 1, .flags = KVM_MEM_GUEST_MEMFD, .guest_phys_addr = PRIVATE_BASE,
		.memory_size = PRIVATE_SIZE, .guest_memfd = m.memfd }));
	m.vcpu = check("KVM_CREATE_VCPU", ioctl(m.vm, KVM_CREATE_VCPU, 0));
	m.run = mmap(NULL, m.mapped, PROT_READ | PROT_WRITE, MAP_SHARED, m.vcpu, 0);
	if (m.memory == MAP_FAILED || m.run == MAP_FAILED)
		check("mmap", -1);
	check("KVM_GET_SREGS", ioctl(m.vcpu, KVM_GET_SREGS, &sregs));
	sregs.cs.base = sregs.cs.selector = 0;
	check("KVM_SET_SREGS", ioctl(m.vcpu, KVM_SET_SREGS, &sregs));
	check("KVM_SET_REGS", ioctl(m.vcpu, KVM_SET_REGS, &regs));
	return m;
}

static void run(const struct machine *m)
{
	m->run->exit_reason = 0;
	check("KVM_RUN", ioctl(m->vcpu, KVM_RUN, 0));
	if (m->run->exit_reason != KVM_EXIT_IO) {
		fprintf(stderr, "exit %u\n", m->run->exit_reason);
		exit(1);
	}
}

static void destroy(const struct machine *m)
{
	munmap(m->run, m->mapped);
	close(m->vcpu);
	close(m->memfd);
	close(m->vm);
	munmap(m->memory, 4096);
	close(m->kvm);
}

static long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000L + time.tv_nsec;
}

int main(int argc, char **argv)
{
	long count = argc == 3 ? atol(argv[2]) : 0, began;

	if (count <= 0 || (strcmp(argv[1], "exits") && strcmp(argv[1], "machines"))) {
		fprintf(stderr, "usage: kvm_guest exits|machines COUNT\n");
		return 2;
	}
	if (!strcmp(argv[1], "exits")) {
		struct machine m = make();

		run(&m);
		began = now();
		while (count--)
			run(&m);
		printf("%ld\n", now() - began);
		destroy(&m);
	} else {
		began = now();
		while (count--) {
			struct machine m = make();

			run(&m);
			destroy(&m);
		}
		printf("%ld\n", now() - began);
	}
	return 0;
}
