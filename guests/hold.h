/*
 * spin hold: private memory with content that never passed through the VMM,
 * and that can be recognised with SEED.
 *
 * The word at address A of the heap is output number A / 8 of SplitMix64
 * (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", 2014)
 * seeded with SEED.  So wherever a word turns up, it tells its own address.
 *
 * The guest prints "ready START END", where the heap is.  Then it answers each
 * line with a line, until stdin ends:
 *
 *   check START LENGTH	"intact", or "broken ADDRESS" of the first other word
 *   share START LENGTH	make whole pages shared: "shared", or "error"
 *   hide START LENGTH	make whole pages private, full of zeroes: "hidden", or
 *			"error"
 *   exit		end at once
 *
 * Numbers are hexadecimal and addresses are the guest's own.
 */
#ifndef HOLD_H
#define HOLD_H

#include <restrictedmem/guest.h>

#include "lines.h"

static inline u64 hold_word(u64 seed, const u64 *at)
{
	u64 z = seed + (u64)at / 8 * 0x9e3779b97f4a7c15;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

static inline char *hold_check(char *to, u64 seed, const u64 *at,
			       const u64 *end)
{
	for (; at < end; at++)
		if (*at != hold_word(seed, at))
			return put_hex(put_string(to, "broken "), (u64)at);
	return put_string(to, "intact");
}

static inline char *hold_answer(char *to, u64 seed, u64 *heap, u64 *end,
				u8 *line, u64 length)
{
	int check = take_word("check", &line, &length);
	int share = !check && take_word("share", &line, &length);
	s64 (*convert)(const void *, u64) = share ? guest_share : guest_unshare;
	u64 start, size;

	if (!check && !share && !take_word("hide", &line, &length))
		return put_string(to, "error: unknown request");
	if (!take_hex(&line, &length, &start) ||
	    !take_hex(&line, &length, &size) || length || start < (u64)heap ||
	    start > (u64)end || size > (u64)end - start)
		return put_string(to, "error: not a range of the heap");
	if (check)
		return hold_check(to, seed, (u64 *)(start & ~7UL),
				  (u64 *)(start + size));
	if (size % PAGE_SIZE || convert((const void *)start, size))
		return put_string(to, "error: cannot convert");
	return put_string(to, share ? "shared" : "hidden");
}

static inline int hold(const struct boot_info *boot, u64 *heap, u64 *end,
		       const char *argument)
{
	static struct lines in;
	char text[64], *to;
	u8 *line = (u8 *)argument;
	u64 seed, length = argument ? string_length(argument) : 0;
	s64 n;

	if (length != 16 || !take_hex(&line, &length, &seed) || length)
		return guest_fail(boot, "spin: SEED is 16 hex digits\n", 2);
	for (u64 *at = heap; at < end; at++)
		*at = hold_word(seed, at);

	in.boot = boot;
	to = put_hex(put_string(text, "ready "), (u64)heap);
	*to++ = ' ';
	to = put_hex(to, (u64)end);
	for (;;) {
		*to++ = '\n';
		if (guest_write(boot, STREAM_OUT, text, (u64)(to - text)))
			return 1;
		n = next_line(&in, &line);
		length = (u64)n;
		if (n == LINES_END)
			return 0;
		if (n == LINES_TOO_LONG)
			length = 0;
		else if (n < 0)
			return 1;
		if (length == 4 && take_word("exit", &line, &length))
			return 0;
		to = hold_answer(text, seed, heap, end, line, length);
	}
}

#endif
