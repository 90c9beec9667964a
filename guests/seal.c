/*
 * A service that signs for its owner, with a key that the owner cannot get.
 * The guest makes the key of RDRAND; the key never leaves it and ends with it.
 *
 * Each line on stdin is a request, answered by a line, until stdin ends:
 *
 *   sign DATA		HMAC-SHA-256 (FIPS 198-1) of DATA, 64 hexadecimal digits
 *   verify TAG DATA	"ok" if TAG is what sign would answer, else "bad"
 *   report DATA	the engine's signed report over DATA, at most 64 bytes,
 *			filled up with zero bytes; in hexadecimal
 *
 * The answer to a request that fails begins with "error".
 */
#include <restrictedmem/guest.h>

#include "lines.h"
#include "sha256_block.h"

#define RDRAND_TRIES	10	/* as Intel recommends before giving up */

/* SHA-256 after the padded key's block: the start of each HMAC. */
struct key {
	struct sha256 inner, outer;
};

static struct lines in;
static char answer[2 * PAGE_SIZE + 1];

static int rdrand(u64 *word)
{
	for (int i = 0; i < RDRAND_TRIES; i++) {
		u8 done;

		asm volatile("rdrand %0; setc %1"
			     : "=r"(*word), "=qm"(done) : : "cc");
		if (done)
			return 1;
	}
	return 0;
}

static void pad_key(struct sha256 *sha, const u64 secret[8], u64 pad)
{
	u64 block[8];

	for (int i = 0; i < 8; i++)
		block[i] = secret[i] ^ pad;
	sha256_init(sha);
	sha256_blocks(sha, (const u8 *)block, sizeof(block));
}

/* Make a key as long as SHA-256's block; HMAC uses such a key unchanged. */
static int make_key(struct key *key)
{
	u64 secret[8];

	for (int i = 0; i < 8; i++)
		if (!rdrand(&secret[i]))
			return 0;
	pad_key(&key->inner, secret, 0x3636363636363636);
	pad_key(&key->outer, secret, 0x5c5c5c5c5c5c5c5c);
	return 1;
}

static void sign(const struct key *key, const u8 *data, u64 length,
		 char tag[SHA256_HEX])
{
	struct sha256 sha = key->inner;
	u32 digest[SHA256_SIZE / 4];
	u64 whole = sha256_blocks(&sha, data, length);

	sha256_last(&sha, data + whole, length - whole);
	for (int i = 0; i < SHA256_SIZE / 4; i++)
		digest[i] = __builtin_bswap32(sha.state[i]);
	sha = key->outer;
	sha256_finish(&sha, (const u8 *)digest, sizeof(digest), tag);
}

/* Compare in a time that does not depend on where a wrong tag differs. */
static int same(const u8 *a, const char *b, u64 length)
{
	u8 difference = 0;

	for (u64 i = 0; i < length; i++)
		difference |= a[i] ^ (u8)b[i];
	return !difference;
}

static char *verify(char *to, const struct key *key, const u8 *line, u64 length)
{
	char tag[SHA256_HEX];
	u64 taken = SHA256_HEX + 1;

	if (length == SHA256_HEX)	/* no DATA, and no space before it */
		taken = length;
	else if (length < taken || line[SHA256_HEX] != ' ')
		return put_string(to, "error: TAG is 64 hexadecimal digits");
	sign(key, line + taken, length - taken, tag);
	return put_string(to, same(line, tag, SHA256_HEX) ? "ok" : "bad");
}

static char *report(char *to, const u8 *data, u64 length)
{
	const u8 *signed_report = (const u8 *)in.boot->report_page;
	u8 padded[REPORT_DATA] = { 0 };
	s64 n;

	if (length > sizeof(padded))
		return put_string(to, "error: a report is over at most 64 bytes");
	memcpy(padded, data, length);
	n = guest_report(in.boot, padded);
	if (n == -ENOSYS)
		return put_string(to, "error: this engine signs no reports");
	if (n <= 0)
		return put_decimal(put_string(to, "error: no report, errno "),
				   (u64)-n);
	for (s64 i = 0; i < n; i++) {
		*to++ = "0123456789abcdef"[signed_report[i] >> 4];
		*to++ = "0123456789abcdef"[signed_report[i] & 15];
	}
	return to;
}

static char *respond(char *to, const struct key *key, u8 *line, s64 n)
{
	u64 length = (u64)n;

	if (n == LINES_TOO_LONG)
		return put_string(to, "error: a line has at most 65536 bytes");
	if (take_word("sign", &line, &length)) {
		sign(key, line, length, to);
		return to + SHA256_HEX;
	}
	if (take_word("verify", &line, &length))
		return verify(to, key, line, length);
	if (take_word("report", &line, &length))
		return report(to, line, length);
	return put_string(to, "error: sign DATA | verify TAG DATA | report DATA");
}

int main(const struct boot_info *boot)
{
	struct key key;
	u8 *line;
	s64 n;

	if (!guest_boot_ok(boot))
		return 2;
	if (boot->argc)
		return guest_fail(boot, "seal: no arguments are taken\n", 2);
	if (!make_key(&key))
		return guest_fail(boot, "seal: RDRAND has no randomness\n", 1);

	in.boot = boot;
	while ((n = next_line(&in, &line)) >= 0 || n == LINES_TOO_LONG) {
		char *end = respond(answer, &key, line, n);

		*end++ = '\n';
		if (guest_write(boot, STREAM_OUT, answer, (u64)(end - answer)))
			return guest_fail(boot, "seal: cannot write\n", 1);
	}
	if (n != LINES_END)
		return guest_fail(boot, "seal: cannot read\n", 1);
	return 0;
}
