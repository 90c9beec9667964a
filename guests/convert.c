/*
 * Walk private memory, make ranges of it shared and private again, and check
 * the content from both sides after each conversion.  The guest checks its own
 * view; the VMM checks its mapping of the shared half (hypercall check).
 *
 * The checks are those of KVM's private_mem_conversions_test, and two more: the
 * VMM puts another byte into the shared half of private pages, and in one stage
 * every other range really is of the other kind than its neighbours.
 *
 * Prints a line for each stage; exits with 1 after the first that fails.
 */
#include <restrictedmem/guest.h>

#include "lines.h"


/* Bytes that memory is filled with; new memory is 0. */
#define GUARD	0xcc		/* private, and not being converted */
#define SECRET	0x11		/* private */
#define PUBLIC	0x22		/* shared, written by the guest */
#define OWNERS	0x33		/* written by the VMM while the page is private */
#define ANSWER	0x44		/* written by the VMM over PUBLIC */

static const char *failed;
static u64 failed_at;

static int fail(const char *what, const void *at)
{
	failed = what;
	failed_at = (u64)at;
	return 0;
}

/* The functions below return true when all is well. */

static int share(const u8 *at, u64 length)
{
	return !guest_share(at, length) || fail("cannot be shared", at);
}

static int unshare(const u8 *at, u64 length)
{
	return !guest_unshare(at, length) || fail("cannot be private", at);
}

static int guest_sees(const u8 *at, u64 length, u8 byte, const char *otherwise)
{
	const any_u64 *word = (const any_u64 *)at;
	const any_u64 *end = (const any_u64 *)(at + length);

	for (; word < end; word++)
		if (*word != byte * 0x0101010101010101UL)
			return fail(otherwise, word);
	return 1;
}

/* The VMM's half holds only @old; the VMM fills it with @new. */
static int owner_sees(const u8 *at, u64 length, u8 old, u8 new,
		      const char *otherwise)
{
	return !hypercall4(HYPERCALL_CHECK, (u64)at, length, old, new) ||
	       fail(otherwise, at);
}

/* Convert private memory to shared and back; leaves zeroes in both halves. */
static int there_and_back(u8 *at, u64 length)
{
	memset(at, SECRET, length);
	if (!owner_sees(at, length, 0, OWNERS, "the owner sees a private page") ||
	    !guest_sees(at, length, SECRET, "the owner wrote a private page") ||
	    !share(at, length) ||
	    !guest_sees(at, length, OWNERS, "a shared page is not the owner's"))
		return 0;
	memset(at, PUBLIC, length);
	return owner_sees(at, length, PUBLIC, ANSWER, "the owner sees no store") &&
	       guest_sees(at, length, ANSWER, "the guest sees no answer") &&
	       unshare(at, length) &&
	       guest_sees(at, length, 0, "private content came back") &&
	       owner_sees(at, length, 0, 0, "shared content was kept");
}

static int one_by_one(u8 *start, u64 size, u64 n)
{
	const u8 *end = start + n * size;

	memset(start, GUARD, n * size);
	for (u8 *at = start; at < end; at += size) {
		if (!there_and_back(at, size))
			return 0;
		memset(at, GUARD, size);
		/* The conversions must not have changed the pages beside. */
		if (at > start && !guest_sees(at - PAGE_SIZE, PAGE_SIZE, GUARD,
					      "the page before has changed"))
			return 0;
		if (at + size < end && !guest_sees(at + size, PAGE_SIZE, GUARD,
						   "the page after has changed"))
			return 0;
	}
	return 1;
}

/* Make every other range shared; then make these private, the others shared. */
static int odd_and_even(u8 *start, u64 size, u64 n)
{
	u8 *at = start;

	memset(start, GUARD, n * size);
	for (u64 i = 1; i < n; i += 2)
		if (!share(start + i * size, size))
			return 0;
	for (u64 i = 0; i < n; i++, at += size) {
		if (i % 2)
			memset(at, PUBLIC, size);
		if (!owner_sees(at, size, i % 2 ? PUBLIC : 0,
				i % 2 ? ANSWER : OWNERS,
				"the owner sees something else"))
			return 0;
	}
	for (u64 i = 0; i < n; i++)
		if (!guest_sees(start + i * size, size, i % 2 ? ANSWER : GUARD,
				"the guest sees something else"))
			return 0;

	for (u64 i = 0; i < n; i++)
		if (!(i % 2 ? unshare : share)(start + i * size, size))
			return 0;
	for (u64 i = 0; i < n; i++)
		if (!guest_sees(start + i * size, size, i % 2 ? 0 : OWNERS,
				"the guest sees something else, exchanged"))
			return 0;
	/* One call, over pages of both kinds. */
	return unshare(start, n * size) &&
	       guest_sees(start, n * size, 0, "not all is new") &&
	       owner_sees(start, n * size, 0, 0, "the owner's half is not new");
}

static int at_once(u8 *start, u64 size, u64 n)
{
	return there_and_back(start, n * size);
}

static int refused(u8 *start, u64 size, u64 n)
{
	u64 gpa = (u64)start;

	(void)n;
	return (map_gpa_range(gpa + 1, 1, MAP_GPA_RANGE_DECRYPTED) == -EINVAL &&
		map_gpa_range(gpa, 0, MAP_GPA_RANGE_DECRYPTED) == -EINVAL &&
		map_gpa_range(-size, 2, MAP_GPA_RANGE_DECRYPTED) == -EINVAL &&
		map_gpa_range(gpa, ~0UL, MAP_GPA_RANGE_DECRYPTED) == -EINVAL) ||
	       fail("a range that is none was taken", start);
}

static const struct stage {
	const char *name;
	int (*run)(u8 *start, u64 size, u64 n);
	u64 size, max;		/* of a range, of ranges */
} stages[] = {
	{ "unaligned, empty, wrapping", refused, PAGE_SIZE, 1 },
	{ "4 KiB, one by one", one_by_one, 0x1000, 512 },
	{ "4 KiB, odd and even", odd_and_even, 0x1000, 512 },
	{ "64 KiB, one by one", one_by_one, 0x10000, 512 },
	{ "64 KiB, odd and even", odd_and_even, 0x10000, 512 },
	{ "2 MiB, one by one", one_by_one, 0x200000, 512 },
	{ "2 MiB, odd and even", odd_and_even, 0x200000, 512 },
	{ "all pages at once", at_once, PAGE_SIZE, ~0UL },
};

static int run(const struct boot_info *boot, const struct stage *stage)
{
	char line[160], *to = put_string(put_string(line, stage->name), ": ");
	u64 start = (boot->heap_base + stage->size - 1) & ~(stage->size - 1);
	u64 end = guest_heap_end(boot);
	u64 n = start < end ? (end - start) / stage->size : 0;
	int good = 1;

	if (n > stage->max)
		n = stage->max;
	if (!n) {
		to = put_string(to, "no room");
	} else if ((good = stage->run((u8 *)start, stage->size, n))) {
		to = put_string(put_decimal(to, n), " ok");
	} else {
		to = put_hex(put_string(put_string(to, failed), ", at "),
			     failed_at);
	}
	*to++ = '\n';
	return !guest_write(boot, STREAM_OUT, line, (u64)(to - line)) && good;
}

int main(const struct boot_info *boot)
{
	if (!guest_boot_ok(boot))
		return 2;
	if (boot->argc)
		return guest_fail(boot, "convert: no arguments are taken\n", 2);
	for (u64 i = 0; i < sizeof(stages) / sizeof(stages[0]); i++)
		if (!run(boot, &stages[i]))
			return 1;
	return 0;
}
