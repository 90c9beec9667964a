/*
 * Something to do for tests and benchmarks: argument 0 says what, argument 1
 * is a decimal number for those that take one.
 *
 *   empty	nothing at all
 *   exit N	exit with status N, at most 255
 *   echo	copy stdin to stdout, all within the shared window
 *   touch	write one word in each page of the heap
 *   loop	do so over and over, for ever
 *   hash N	touch N MiB of the heap, then print their SHA-256; the heap is
 *		gone round as often as N takes, and as all its pages look alike
 *		(HEAP_WORD, then zeros) the digest does not depend on its size
 */
#include <restrictedmem/guest.h>

#include "sha256_block.h"

#define HEAP_WORD	0x454741504d454d52	/* "RMEMPAGE" */
#define NUMBER_MAX	0xffffffff		/* N MiB still fit a u64 */

static void touch(u8 *start, u8 *end)
{
	/* volatile: nobody reads the words, the writing is the point. */
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

/* Whether @s is a decimal number; none given is 0. */
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

int main(const struct boot_info *boot)
{
	const char *mode;
	u8 *heap, *end;
	u64 n;

	if (!guest_boot_ok(boot))
		return 2;

	heap = (u8 *)boot->heap_base;
	end = (u8 *)guest_heap_end(boot);
	mode = guest_argument(boot, 0);
	if (mode && boot->argc <= 2 && parse(guest_argument(boot, 1), &n)) {
		if (string_equal(mode, "empty"))
			return 0;
		if (string_equal(mode, "exit") && n <= 255)
			return (int)n;
		if (string_equal(mode, "echo"))
			return echo(boot);
		if (string_equal(mode, "touch")) {
			touch(heap, end);
			return 0;
		}
		if (string_equal(mode, "loop"))
			for (;;)
				touch(heap, end);
		if (string_equal(mode, "hash"))
			return hash(boot, heap, (u64)(end - heap), n << 20);
	}
	return guest_fail(boot, "usage: spin empty | exit N | echo | touch | "
				"loop | hash N\n", 2);
}
