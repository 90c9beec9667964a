/*
 * Guest ABI, version 2: the contract between a guest and its loader.
 *
 * A guest is a static x86-64 ELF.  It runs in long mode at CPL3, identity
 * mapped (guest virtual = guest physical).  It sees only four ranges:
 *
 *   HYPERCALL_PAGE              one page, read/execute, made by the engine
 *   REPORT_PAGE                 one page, read/write, made by the engine
 *   SHARED_BASE  + shared_size  visible to the guest and to the VMM
 *   PRIVATE_BASE + private_size visible to the guest alone, except for pages
 *                               that it has made shared: map_gpa_range()
 *
 * Private memory starts as zeroes, except for the parts that the loader writes:
 *
 *   PRIVATE_BASE                struct boot_info, then the argument strings
 *   PRIVATE_BASE + BOOT_SIZE    the ELF (IMAGE_BASE), bss included
 *   heap_base                   free for the guest
 *   PRIVATE_BASE + private_size the stacks, which grow down; the stack of vCPU
 *                               i begins i * STACK_SIZE below this address
 *
 * All vCPUs begin at _start, at the same time.  rdi holds the address of struct
 * boot_info and rsi the vCPU's number.  rsp is 16-byte aligned (nothing was
 * pushed).  The direction flag is clear; all other registers are unspecified.
 * vCPU 0 calls main(), the others secondary().  The guest ends when any vCPU
 * calls exit.  Guests use no SSE or x87 state.
 *
 * A hypercall is a near call to HYPERCALL_PAGE, with the number in rax and the
 * arguments in rdi, rsi, rdx, r10, r8.  The result is in rax: a negative errno
 * on failure.  The call clobbers rcx, r11 and the flags, and preserves all
 * other registers.
 *
 * A hypercall's result and shared memory come from the VMM.  Both may be wrong,
 * and shared memory may change at any time.  So copy data into private memory
 * first, then check the copy.
 */
#ifndef RESTRICTEDMEM_GUEST_H
#define RESTRICTEDMEM_GUEST_H

#define HYPERCALL_PAGE		0x00100000
#define REPORT_PAGE		0x00101000
#define SHARED_BASE		0x10000000
#define PRIVATE_BASE		0x40000000
#define PRIVATE_SIZE_DEFAULT	0x04000000	/* 64 MiB */
#define PRIVATE_SIZE_MIN	0x00100000	/* 1 MiB */
#define BOOT_SIZE		0x00010000	/* for boot_info and arguments */
#define IMAGE_BASE		0x40010000	/* PRIVATE_BASE + BOOT_SIZE */
#define STACK_SIZE		0x00010000	/* of each vCPU */
#define PAGE_SIZE		0x1000

#define BOOT_MAGIC		0x544f4f424d454d52	/* "RMEMBOOT" */
#define BOOT_VERSION		2

/*
 * exit(status)			ends the guest with a status from 0 to 255;
 *				never returns
 * read(offset, length)		the VMM writes input to SHARED_BASE + offset;
 *				returns the bytes written, at most length, and
 *				0 only at the end of the input
 * write(stream, offset, length) the VMM reads output at SHARED_BASE + offset;
 *				returns the bytes taken, at least 1 unless
 *				length is 0
 * report()			the engine, not the VMM, answers: it signs the
 *				first REPORT_DATA bytes of REPORT_PAGE and
 *				writes the report there; returns its length
 * park()			never returns: this vCPU does not run again
 * check(gpa, length, old, new)	the VMM compares its half of a range of private
 *				memory; returns 0 if each byte was old, and
 *				makes each new; else returns -EIO and changes
 *				nothing
 * map_gpa_range(gpa, npages, attributes)
 *				KVM_HC_MAP_GPA_RANGE: makes pages shared, or
 *				private with MAP_GPA_RANGE_ENCRYPTED; their old
 *				content is lost in both directions
 */
#define HYPERCALL_EXIT		0
#define HYPERCALL_READ		1
#define HYPERCALL_WRITE		2
#define HYPERCALL_REPORT	3
#define HYPERCALL_PARK		4
#define HYPERCALL_CHECK		5
#define HYPERCALL_MAP_GPA_RANGE	12

#define REPORT_DATA		64	/* bytes */

/* As in Linux's <asm/kvm_para.h>. */
#define MAP_GPA_RANGE_PAGE_SZ_4K	0
#define MAP_GPA_RANGE_PAGE_SZ_2M	1
#define MAP_GPA_RANGE_ENCRYPTED		0x10
#define MAP_GPA_RANGE_DECRYPTED		0

#define STREAM_OUT		1
#define STREAM_ERR		2

#ifndef __ASSEMBLER__

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;
typedef long s64;

#define NULL	((void *)0)

#define EIO	5			/* the VMM broke the contract above */
#define EINVAL	22
#define ENOSYS	38

struct boot_info {
	u64 magic;			/* BOOT_MAGIC */
	u32 version;			/* BOOT_VERSION */
	u32 argc;			/* arguments, without a program name */
	u64 private_base;
	u64 private_size;
	u64 shared_base;
	u64 shared_size;
	u64 hypercall_page;
	u64 heap_base;			/* first page after the ELF's bss */
	u64 args;			/* argc strings in a row, each with NUL */
	u64 report_page;
	u64 vcpus;
};

_Static_assert(sizeof(struct boot_info) == 88, "boot_info is ABI");

/* A guest defines main(), and secondary() if other vCPUs have work. */
int main(const struct boot_info *boot);
int secondary(const struct boot_info *boot, u64 index);

/* A word at any address, over data of any type, as a plain u64 may not be. */
typedef u64 __attribute__((may_alias, aligned(1))) any_u64;

static inline void *memcpy(void *to, const void *from, u64 length)
{
	u8 *d = to;
	const u8 *s = from;

	/*
	 * An emulated access costs the same for 8 bytes as for 1, and a loop's
	 * iteration costs more.  So this copies words, eight in an iteration.
	 */
	for (; length >= 64; d += 64, s += 64, length -= 64)
#pragma GCC unroll 8
		for (int i = 0; i < 8; i++)
			((any_u64 *)d)[i] = ((const any_u64 *)s)[i];
	for (; length >= 8; d += 8, s += 8, length -= 8)
		*(any_u64 *)d = *(const any_u64 *)s;
	while (length--)
		*d++ = *s++;
	return to;
}

static inline void *memset(void *to, int byte, u64 length)
{
	u64 word = (u8)byte * 0x0101010101010101UL;
	u8 *d = to;

	for (; length >= 8; d += 8, length -= 8)
		*(any_u64 *)d = word;
	while (length--)
		*d++ = (u8)byte;
	return to;
}

static inline u64 string_length(const char *s)
{
	u64 n = 0;

	while (s[n])
		n++;
	return n;
}

static inline int string_equal(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

static inline s64 hypercall4(u64 number, u64 a, u64 b, u64 c, u64 d)
{
	register u64 r10 asm("r10") = d;
	s64 result;

	/*
	 * The call pushes its return address, so guests are compiled with
	 * -mno-red-zone.  "memory": the VMM may write the shared window.
	 */
	asm volatile("call %P[page]"
		     : "=a"(result)
		     : [page] "i"(HYPERCALL_PAGE),
		       "0"(number), "D"(a), "S"(b), "d"(c), "r"(r10)
		     : "rcx", "r11", "cc", "memory");
	return result;
}

static inline s64 hypercall(u64 number, u64 a, u64 b, u64 c)
{
	return hypercall4(number, a, b, c, 0);
}

static inline void __attribute__((noreturn)) guest_exit(int status)
{
	for (;;)
		hypercall(HYPERCALL_EXIT, (u64)status, 0, 0);
}

/* Accept a count from the VMM only if it is at most the length asked for. */
static inline s64 checked_count(s64 n, u64 length)
{
	return n > 0 && (u64)n > length ? -EIO : n;
}

/* Return argument @i, counted from 0, or NULL. */
static inline const char *guest_argument(const struct boot_info *boot, u32 i)
{
	const char *s = (const char *)boot->args;

	if (i >= boot->argc)
		return NULL;
	while (i--)
		s += string_length(s) + 1;
	return s;
}

/* Ask for at most @length bytes at the start of the shared window. */
static inline s64 shared_read(u64 length)
{
	return checked_count(hypercall(HYPERCALL_READ, 0, length, 0), length);
}

/* Write all of the first @length bytes of the shared window to @stream. */
static inline s64 shared_write(int stream, u64 length)
{
	u64 done = 0;

	while (done < length) {
		s64 n = checked_count(hypercall(HYPERCALL_WRITE, (u64)stream,
						done, length - done),
				      length - done);
		if (n <= 0)
			return n ? n : -EIO;
		done += (u64)n;
	}
	return 0;
}

/* Read at most @length bytes into private memory; 0 at the end of the input. */
static inline s64 guest_read(const struct boot_info *boot, void *to, u64 length)
{
	s64 n;

	if (length > boot->shared_size)
		length = boot->shared_size;
	n = shared_read(length);
	if (n > 0)
		memcpy(to, (const void *)boot->shared_base, (u64)n);
	return n;
}

/* Write all @length bytes from private memory; 0 or a negative errno. */
static inline s64 guest_write(const struct boot_info *boot, int stream,
			      const void *from, u64 length)
{
	const u8 *s = from;

	while (length) {
		u64 n = length < boot->shared_size ? length : boot->shared_size;
		s64 error;

		memcpy((void *)boot->shared_base, s, n);
		error = shared_write(stream, n);
		if (error)
			return error;
		s += n;
		length -= n;
	}
	return 0;
}

/* Write @message to the error stream, and return @status, to exit with. */
static inline int guest_fail(const struct boot_info *boot, const char *message,
			     int status)
{
	guest_write(boot, STREAM_ERR, message, string_length(message));
	return status;
}

/* Ask for @npages pages from @gpa on to be shared or private; 0 or -errno. */
static inline s64 map_gpa_range(u64 gpa, u64 npages, u64 attributes)
{
	return hypercall(HYPERCALL_MAP_GPA_RANGE, gpa, npages, attributes);
}

/* Make a range shared; @length is in bytes, whole pages. */
static inline s64 guest_share(const void *start, u64 length)
{
	return map_gpa_range((u64)start, length / PAGE_SIZE,
			     MAP_GPA_RANGE_DECRYPTED);
}

/* Make a range private again; @length is in bytes, whole pages. */
static inline s64 guest_unshare(const void *start, u64 length)
{
	return map_gpa_range((u64)start, length / PAGE_SIZE,
			     MAP_GPA_RANGE_ENCRYPTED);
}

/*
 * Have the engine sign @data.  Returns the report's length, or a negative errno
 * on failure.  The report is at boot->report_page until the next one.
 */
static inline s64 guest_report(const struct boot_info *boot,
			       const u8 data[REPORT_DATA])
{
	memcpy((void *)boot->report_page, data, REPORT_DATA);
	return checked_count(hypercall(HYPERCALL_REPORT, 0, 0, 0), PAGE_SIZE);
}

/* Return the end of the heap: page aligned, below the last vCPU's stack. */
static inline u64 guest_heap_end(const struct boot_info *boot)
{
	return (boot->private_base + boot->private_size -
		boot->vcpus * STACK_SIZE) & ~(u64)(PAGE_SIZE - 1);
}

/* Say whether the loader has this ABI's version, and the heap has a page. */
static inline int guest_boot_ok(const struct boot_info *boot)
{
	return boot->magic == BOOT_MAGIC && boot->version == BOOT_VERSION &&
	       boot->shared_size && boot->heap_base < guest_heap_end(boot);
}

#endif /* __ASSEMBLER__ */
#endif
