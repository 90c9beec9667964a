/*
 * The work of the guest `seal`, done by an ordinary process: seal FD
 *
 * Answers each line `sign DATA` on the socket with HMAC-SHA-256 of DATA in
 * hexadecimal, by the guest's own SHA-256.  Ends with the connection.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>

/* The guest's types, without the rest of guest.h. */
#define RESTRICTEDMEM_GUEST_H
typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long u64;
typedef u64 __attribute__((may_alias, aligned(1))) any_u64;
#include "../../guests/sha256_block.h"

static void pad_key(struct sha256 *sha, const u64 secret[8], u64 pad)
{
	u64 block[8];

	for (int i = 0; i < 8; i++)
		block[i] = secret[i] ^ pad;
	sha256_init(sha);
	sha256_blocks(sha, (const u8 *)block, sizeof(block));
}

static void sign(struct sha256 inner, struct sha256 outer, const u8 *data,
		 u64 length, char tag[SHA256_HEX])
{
	u32 digest[SHA256_SIZE / 4];
	u64 whole = sha256_blocks(&inner, data, length);

	sha256_last(&inner, data + whole, length - whole);
	for (int i = 0; i < SHA256_SIZE / 4; i++)
		digest[i] = __builtin_bswap32(inner.state[i]);
	sha256_finish(&outer, (const u8 *)digest, sizeof(digest), tag);
}

int main(int argc, char **argv)
{
	static u8 line[4096];
	char answer[SHA256_HEX + 1];
	struct sha256 inner, outer;
	u64 secret[8];
	int fd = argc == 2 ? atoi(argv[1]) : -1;
	ssize_t n;

	if (fd < 0 || getrandom(secret, sizeof(secret), 0) != sizeof(secret)) {
		fprintf(stderr, "usage: seal FD\n");
		return 2;
	}
	pad_key(&inner, secret, 0x3636363636363636);
	pad_key(&outer, secret, 0x5c5c5c5c5c5c5c5c);
	answer[SHA256_HEX] = '\n';
	while ((n = recv(fd, line, sizeof(line), 0)) > 0) {
		if (n < 6 || memcmp(line, "sign ", 5) || line[n - 1] != '\n')
			return 1;
		sign(inner, outer, line + 5, n - 6, answer);
		if (send(fd, answer, sizeof(answer), MSG_NOSIGNAL) < 0)
			return 1;
	}
	return 0;
}
