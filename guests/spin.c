/*
 * Workloads for tests and benchmarks.  Argument 0 chooses one; argument 1 is a
 * decimal number for those that take one.
 *
 *   empty	nothing at all
 *   exit N	exit with status N, at most 255
 *   echo	copy stdin to stdout, all within the shared window
 *   touch	write one word in each page of the heap
 *   loop	touch the heap over and over, for ever, on every vCPU
 *   hash N	touch N MiB of the heap, then print their SHA-256; the guest
 *		goes round the heap as often as N needs, and all pages look
 *		alike (HEAP_WORD, then zeros), so the digest does not depend on
 *		the heap's size
 *   smp N	on every vCPU, N atomic increments of one counter and N plain
 *		ones of the vCPU's own; prints the sum
 *   convert-steps N
 *		touch the whole heap; then make it shared, 2 MiB at a time, and
 *		touch N pages of each 2 MiB; then make it private likewise;
 *		prints a line after each of the three
 *   hold SEED	fill the heap with a stream made of SEED, 16 hexadecimal digits,
 *		and answer requests about it; see hold.h
 */
#include <restrictedmem/guest.h>

#include "hold.h"
#include "sha256_block.h"

#define HEAP_WORD	0x454741504d454d52	/* "RMEMPAGE" */
#define NUMBER_MAX	0xffffffff		/* N MiB still fit a u64 */
#define STEP		0x200000		/* 2 MiB */

/* One vCPU's part of smp, on a page of its own at the heap's beginning. */
struct turns {
	volatile u64 count;
	u8 padding[PAGE_SIZE - 8];
};

static volatile u64 total, finished;

static void touch(u8 *start, u8 *end)
{
	/* volatile: nobody reads the words, but the writes must happen. */
	for (; start < end; start += PAGE_SIZE)
		*(volatile u64 *)start = HEAP_WORD;
}

static int hash(const struct boot_info *boot, u8 *heap, u64 heap_size, u64 n)
{
	struct sha256 sha;
	char line[SHA256_HEX + 1];
	u64 turn;

	touch(heap, heap + (n < heap_size ? n : heap_size));
	sha256_init(&sha);
	for (; n; n -= turn) {
		turn = n < heap_size ? n : heap_size;
		sha256_blocks(&sha, heap, turn);
	}
	sha256_finish(&sha, heap, 0, line);
	line[SHA256_HEX] = '\n';
	return guest_write(boot, STREAM_OUT, line, sizeof(line)) ? 1 : 0;
}

static int echo(const struct boot_info *boot)
{
	s64 n;

	while ((n = shared_read(boot->shared_size)) > 0)
		if (shared_write(STREAM_OUT, (u64)n))
			return 1;
	return n ? 1 : 0;
}

static void atomic_increment(volatile u64 *counter)
{
	asm volatile("lock incq %0" : "+m"(*counter) : : "cc");
}

static void take_turns(const struct boot_info *boot, u64 index, u64 n)
{
	struct turns *own = (struct turns *)boot->heap_base + index;

	while (own->count < n) {
		atomic_increment(&total);
		own->count++;
	}
	atomic_increment(&finished);
}

static int smp(const struct boot_info *boot, u64 n)
{
	const struct turns *turns = (const struct turns *)boot->heap_base;
	char line[64], *end;

	if ((u64)(turns + boot->vcpus) > guest_heap_end(boot))
		return guest_fail(boot, "spin: too little memory\n", 2);
	take_turns(boot, 0, n);
	while (finished < boot->vcpus)
		;

	end = put_decimal(line, total);
	*end++ = '\n';
	if (guest_write(boot, STREAM_OUT, line, (u64)(end - line)))
		return 1;
	for (u64 i = 0; i < boot->vcpus; i++)
		if (turns[i].count != n)
			return guest_fail(boot, "spin: wrong count\n", 1);
	return total != n * boot->vcpus;
}

/* Convert each whole STEP with @convert, and touch @n of its pages. */
static int steps(const struct boot_info *boot, u8 *heap, u8 *end, u64 n,
		 s64 (*convert)(const void *, u64), const char *line)
{
	heap = (u8 *)(((u64)heap + STEP - 1) & ~(u64)(STEP - 1));
	for (; end - heap >= STEP; heap += STEP) {
		if (convert(heap, STEP))
			return guest_fail(boot, "spin: cannot convert\n", 1);
		touch(heap, heap + n * PAGE_SIZE);
	}
	return guest_write(boot, STREAM_OUT, line, string_length(line)) ? 1 : 0;
}

static int convert_steps(const struct boot_info *boot, u8 *heap, u8 *end, u64 n)
{
	static const char line[] = "touched\n";

	touch(heap, end);
	if (guest_write(boot, STREAM_OUT, line, sizeof(line) - 1))
		return 1;
	return steps(boot, heap, end, n, guest_share, "shared\n") ||
	       steps(boot, heap, end, n, guest_unshare, "private\n");
}

/* Parse @s as a decimal number, 0 if NULL; return whether it is one. */
static int parse(const char *s, u64 *number)
{
	*number = 0;
	if (!s)
		return 1;
	if (!*s)
		return 0;
	for (; *s; s++) {
		if (*s < '0' || *s > '9')
			return 0;
		*number = *number * 10 + (u64)(*s - '0');
		if (*number > NUMBER_MAX)
			return 0;
	}
	return 1;
}

static int mode_is(const struct boot_info *boot, const char *mode)
{
	const char *given = guest_argument(boot, 0);

	return given && boot->argc <= 2 && string_equal(given, mode);
}

int secondary(const struct boot_info *boot, u64 index)
{
	u64 n;

	if (mode_is(boot, "smp") && parse(guest_argument(boot, 1), &n))
		take_turns(boot, index, n);
	if (mode_is(boot, "loop"))
		for (;;)
			touch((u8 *)boot->heap_base,
			      (u8 *)guest_heap_end(boot));
	return 0;
}

int main(const struct boot_info *boot)
{
	u8 *heap, *end;
	u64 n;

	if (!guest_boot_ok(boot))
		return 2;

	heap = (u8 *)boot->heap_base;
	end = (u8 *)guest_heap_end(boot);
	if (mode_is(boot, "hold"))
		return hold(boot, (u64 *)heap, (u64 *)end,
			    guest_argument(boot, 1));
	if (parse(guest_argument(boot, 1), &n)) {
		if (mode_is(boot, "empty"))
			return 0;
		if (mode_is(boot, "exit") && n <= 255)
			return (int)n;
		if (mode_is(boot, "echo"))
			return echo(boot);
		if (mode_is(boot, "touch")) {
			touch(heap, end);
			return 0;
		}
		if (mode_is(boot, "loop"))
			for (;;)
				touch(heap, end);
		if (mode_is(boot, "hash"))
			return hash(boot, heap, (u64)(end - heap), n << 20);
		if (mode_is(boot, "smp"))
			return smp(boot, n);
		if (mode_is(boot, "convert-steps") && n <= STEP / PAGE_SIZE)
			return convert_steps(boot, heap, end, n);
	}
	return guest_fail(boot, "usage: spin empty | exit N | echo | touch | "
				"loop | hash N | smp N | convert-steps N | "
				"hold SEED\n", 2);
}
