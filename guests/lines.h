/*
 * Requests on stdin, one a line, for guests that answer requests.
 *
 * A line ends with a newline, or with the input.  It may hold any other byte,
 * NUL included.  A guest gets it in private memory, where the VMM cannot change
 * it after a check.
 */
#ifndef LINES_H
#define LINES_H

#include <restrictedmem/guest.h>

#define LINE_MAX	65536	/* bytes, newline not counted */

struct lines {
	const struct boot_info *boot;
	u64 start, end;		/* of the bytes read and not yet returned */
	int skipping;		/* inside a line that was too long */
	u8 buffer[LINE_MAX + 1];
};

/*
 * Read the next line, and return its length; the line is at *line until the
 * next call.  Returns LINES_END at the end of the input, LINES_TOO_LONG for a
 * line that does not fit and is skipped, or a negative errno when the input
 * cannot be read.
 */
#define LINES_END	(-1000)
#define LINES_TOO_LONG	(-1001)

static inline s64 next_line(struct lines *in, u8 **line)
{
	u64 seen = in->start;

	for (;;) {
		s64 n;

		for (; seen < in->end; seen++) {
			u64 length = seen - in->start;

			if (in->buffer[seen] != '\n')
				continue;
			*line = in->buffer + in->start;
			in->start = seen + 1;
			if (!in->skipping)
				return (s64)length;
			in->skipping = 0;
			return LINES_TOO_LONG;
		}

		if (in->end - in->start > LINE_MAX || in->skipping) {
			in->skipping = 1;
			in->start = in->end;
		}
		/* They may overlap; guest.h's memcpy copies upwards. */
		memcpy(in->buffer, in->buffer + in->start, in->end - in->start);
		in->end -= in->start;
		in->start = 0;
		seen = in->end;

		n = guest_read(in->boot, in->buffer + in->end,
			       sizeof(in->buffer) - in->end);
		if (n < 0)
			return n;
		if (!n) {
			u64 length = in->end;

			in->end = 0;
			*line = in->buffer;
			if (!in->skipping)
				return length ? (s64)length : LINES_END;
			in->skipping = 0;
			return LINES_TOO_LONG;
		}
		in->end += (u64)n;
	}
}

/*
 * Take @word and the space after it off the front of a line.  Returns whether
 * the word was there.  A word alone on its line has nothing after it.
 */
static inline int take_word(const char *word, u8 **line, u64 *length)
{
	u64 n = string_length(word);

	if (*length < n || (*length > n && (*line)[n] != ' '))
		return 0;
	for (u64 i = 0; i < n; i++)
		if ((*line)[i] != (u8)word[i])
			return 0;
	n += *length > n;
	*line += n;
	*length -= n;
	return 1;
}

static inline u64 hex_digit(u8 c)
{
	if (c >= '0' && c <= '9')
		return c - (u64)'0';
	if (c >= 'a' && c <= 'f')
		return c - (u64)'a' + 10;
	return 16;
}

/* Take a hexadecimal number, with or without 0x, and the space after it. */
static inline int take_hex(u8 **line, u64 *length, u64 *number)
{
	u64 i = 0, digits = 0;

	if (*length >= 2 && (*line)[0] == '0' && (*line)[1] == 'x')
		i = 2;
	for (*number = 0; i < *length && (*line)[i] != ' '; i++, digits++) {
		u64 digit = hex_digit((*line)[i]);

		if (digit == 16 || digits == 16)
			return 0;
		*number = *number << 4 | digit;
	}
	i += i < *length;
	*line += i;
	*length -= i;
	return digits != 0;
}

/* Write a number; return its end, as all put_*() do. */
static inline char *put_number(char *to, u64 number, u64 base)
{
	char digits[20];
	int n = 0;

	do {
		digits[n++] = "0123456789abcdef"[number % base];
		number /= base;
	} while (number);
	while (n)
		*to++ = digits[--n];
	return to;
}

static inline char *put_decimal(char *to, u64 number)
{
	return put_number(to, number, 10);
}

static inline char *put_hex(char *to, u64 number)
{
	*to++ = '0';
	*to++ = 'x';
	return put_number(to, number, 16);
}

static inline char *put_string(char *to, const char *s)
{
	while (*s)
		*to++ = *s++;
	return to;
}

#endif
