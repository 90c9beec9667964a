/*
 * SHA-256 (FIPS 180-4) for an emulated CPU.
 *
 * On a translating emulator, an addition or a rotation becomes about one host
 * instruction.  An access to memory becomes a TLB lookup and a call, which cost
 * some ten times as much.  So this code avoids memory:
 *
 *   - Message words come in pairs, two to a 64-bit register.  The schedule uses
 *     only the 16 latest words, so eight registers hold them.  A pair costs one
 *     store and one load, and a message pair needs only one bswap.
 *   - The schedule runs ahead of the rounds, since its eight registers and
 *     the rounds' eight do not fit side by side.
 *   - The 64 rounds are written out: their constants become immediates, and
 *     the rotation of a..h becomes a renaming.
 *   - gcc is kept from mixing neighbouring steps, see SETTLE().
 */
#ifndef SHA256_BLOCK_H
#define SHA256_BLOCK_H

#include <restrictedmem/guest.h>

#define SHA256_BLOCK	64	/* bytes */
#define SHA256_SIZE	32	/* bytes of a digest */
#define SHA256_HEX	64	/* its digits */

struct sha256 {
	u32 state[8];
	u64 length;		/* bytes digested */
};

static const u32 sha256_k[64] = {
	0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5,
	0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
	0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3,
	0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
	0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc,
	0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
	0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7,
	0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
	0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13,
	0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
	0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3,
	0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
	0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5,
	0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
	0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208,
	0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
};

/*
 * Force @x into a register here, as a value that gcc knows nothing about, after
 * earlier SETTLE()s and before later ones.  Otherwise gcc reorders the sums of
 * several rounds to hide latency, reads a word from memory repeatedly, and
 * keeps values that one shift could recompute.  An emulator has no latency to
 * hide, and with so many live values some end up on the stack.
 */
#define SETTLE(x) asm volatile("" : "+r"(x))

#define ADD(x, value) do {						\
	(x) += (value);							\
	SETTLE(x);							\
} while (0)

/* The two words of a pair: the earlier one is the upper half. */
static inline u32 word0(u64 pair)
{
	SETTLE(pair);
	return (u32)(pair >> 32);
}

static inline u32 word1(u64 pair)
{
	return (u32)pair;
}

static inline u32 ror(u32 x, int n)
{
	return x >> n | x << (32 - n);
}

/*
 * The four sigmas, FIPS 180-4 section 4.1.2.  Each rotation applies to the
 * value accumulated so far, not to a fresh copy of x: ror(ror(x, 9) ^ x, 11) is
 * ror(x, 20) ^ ror(x, 11).
 */
static inline u32 big_sigma0(u32 x)		/* 2, 13, 22 */
{
	return ror(ror(ror(x, 9) ^ x, 11) ^ x, 2);
}

static inline u32 big_sigma1(u32 x)		/* 6, 11, 25 */
{
	return ror(ror(ror(x, 14) ^ x, 5) ^ x, 6);
}

static inline u32 small_sigma0(u32 x)		/* 7, 18, shift 3 */
{
	return ror(ror(x, 11) ^ x, 7) ^ x >> 3;
}

static inline u32 small_sigma1(u32 x)		/* 17, 19, shift 10 */
{
	return ror(ror(x, 2) ^ x, 17) ^ x >> 10;
}

static inline u64 message_pair(const u8 *block, int i)
{
	return __builtin_bswap64(((const any_u64 *)block)[i]);
}

/*
 * Compute two words of the schedule.  p0 holds the words 16 and 15 back, p1
 * those 14 and 13 back, and so on up to p7.  The new pair replaces p0, which is
 * never needed again.
 */
#define EXPAND(p0, p1, p4, p5, p7, pair) do {				\
	u32 x = word0(p0), y = word1(p0);				\
									\
	ADD(x, word1(p4));						\
	ADD(x, small_sigma0(word1(p0)));				\
	ADD(x, small_sigma1(word0(p7)));				\
	ADD(y, word0(p5));						\
	ADD(y, small_sigma0(word0(p1)));				\
	ADD(y, small_sigma1(word1(p7)));				\
	p0 = (u64)x << 32 | y;						\
	(pair) = p0;							\
} while (0)

/*
 * Compute the words 16 to 63, 16 in an iteration.  This is a loop because it is
 * slower unrolled: gcc then carries words from one iteration to the next on the
 * stack.
 */
static inline void sha256_schedule(u64 w[24], const u8 *block)
{
	u64 p0 = message_pair(block, 0), p1 = message_pair(block, 1);
	u64 p2 = message_pair(block, 2), p3 = message_pair(block, 3);
	u64 p4 = message_pair(block, 4), p5 = message_pair(block, 5);
	u64 p6 = message_pair(block, 6), p7 = message_pair(block, 7);

	for (int i = 0; i < 24; i += 8) {
		EXPAND(p0, p1, p4, p5, p7, w[i + 0]);
		EXPAND(p1, p2, p5, p6, p0, w[i + 1]);
		EXPAND(p2, p3, p6, p7, p1, w[i + 2]);
		EXPAND(p3, p4, p7, p0, p2, w[i + 3]);
		EXPAND(p4, p5, p0, p1, p3, w[i + 4]);
		EXPAND(p5, p6, p1, p2, p4, w[i + 5]);
		EXPAND(p6, p7, p2, p3, p5, w[i + 6]);
		EXPAND(p7, p0, p3, p4, p6, w[i + 7]);
	}
}

/*
 * One round.  maj(a, b, c) is b ^ ((a ^ b) & (b ^ c)), and the a ^ b of this
 * round is the b ^ c of the next.
 */
#define ROUND(a, b, c, d, e, f, g, h, word, i) do {			\
	u32 ab = a ^ b;							\
									\
	ADD(h, (word) + sha256_k[i]);					\
	ADD(h, g ^ (e & (f ^ g)));					\
	ADD(h, big_sigma1(e));						\
	ADD(d, h);							\
	ADD(h, b ^ (ab & bc));						\
	ADD(h, big_sigma0(a));						\
	bc = ab;							\
} while (0)

#define ROUND2(a, b, c, d, e, f, g, h, i) do {				\
	u64 pair = (i) < 16 ? message_pair(block, (i) / 2)		\
			    : w[(i) / 2 - 8];				\
									\
	ROUND(a, b, c, d, e, f, g, h, word0(pair), i);			\
	ROUND(h, a, b, c, d, e, f, g, word1(pair), (i) + 1);		\
} while (0)

#define ROUND8(i) do {							\
	ROUND2(a, b, c, d, e, f, g, h, i);				\
	ROUND2(g, h, a, b, c, d, e, f, (i) + 2);			\
	ROUND2(e, f, g, h, a, b, c, d, (i) + 4);			\
	ROUND2(c, d, e, f, g, h, a, b, (i) + 6);			\
} while (0)

static inline void sha256_rounds(u32 state[8], const u8 *block, const u64 w[24])
{
	u32 a = state[0], b = state[1], c = state[2], d = state[3];
	u32 e = state[4], f = state[5], g = state[6], h = state[7];
	u32 bc;

	SETTLE(a);
	SETTLE(b);
	SETTLE(c);
	SETTLE(d);
	SETTLE(e);
	SETTLE(f);
	SETTLE(g);
	SETTLE(h);
	bc = b ^ c;

	ROUND8(0);
	ROUND8(8);
	ROUND8(16);
	ROUND8(24);
	ROUND8(32);
	ROUND8(40);
	ROUND8(48);
	ROUND8(56);

	state[0] += a;
	state[1] += b;
	state[2] += c;
	state[3] += d;
	state[4] += e;
	state[5] += f;
	state[6] += g;
	state[7] += h;
}

static inline void sha256_init(struct sha256 *sha)
{
	static const struct sha256 initial = {
		.state = {
			0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
			0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
		},
	};

	*sha = initial;
}

/* Digest the whole blocks in @data; return how many bytes they are. */
static __attribute__((noinline)) u64
sha256_blocks(struct sha256 *sha, const u8 *data, u64 length)
{
	u64 whole = length & ~(u64)(SHA256_BLOCK - 1);
	const u8 *end = data + whole;
	u64 w[24];

	sha->length += whole;
	for (; data != end; data += SHA256_BLOCK) {
		sha256_schedule(w, data);
		/*
		 * Have the rounds load what they need when they need it; gcc
		 * would rather keep what the schedule had in registers.
		 */
		asm volatile("" : : "r"(w) : "memory");
		sha256_rounds(sha->state, data, w);
	}
	return whole;
}

/* Digest the last, partial block; the digest is then sha->state. */
static inline void sha256_last(struct sha256 *sha, const u8 *tail, u64 length)
{
	u64 bits = (sha->length + length) * 8;
	u8 last[2 * SHA256_BLOCK];
	/* A one bit and the 64-bit count need 9 bytes after the tail. */
	u64 padded = length + 9 <= SHA256_BLOCK ? SHA256_BLOCK : sizeof(last);

	memset(last, 0, sizeof(last));
	memcpy(last, tail, length);
	last[length] = 0x80;
	*(any_u64 *)(last + padded - 8) = __builtin_bswap64(bits);
	sha256_blocks(sha, last, padded);
}

/* Do the same; write the digest to @hex, without a NUL. */
static inline void sha256_finish(struct sha256 *sha, const u8 *tail, u64 length,
				 char hex[SHA256_HEX])
{
	sha256_last(sha, tail, length);
	for (int i = 0; i < SHA256_HEX; i++)
		hex[i] = "0123456789abcdef"[sha->state[i / 8] >>
					    (28 - i % 8 * 4) & 15];
}

#undef SETTLE
#undef ADD
#undef EXPAND
#undef ROUND
#undef ROUND2
#undef ROUND8

#endif
