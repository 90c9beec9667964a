/*
 * sha256sum for stdin.  The input comes through the shared window.  The guest
 * copies it into private memory, and reads only the copy.
 *
 * The copies go round the whole heap rather than into one buffer, so that a
 * long input uses all of the guest's private memory.  The heap is a whole
 * number of pages, and so of 64-byte blocks.  So no block crosses the heap's
 * end, however short the reads are.
 */
#include <restrictedmem/guest.h>

#include "sha256_block.h"

int main(const struct boot_info *boot)
{
	struct sha256 sha;
	u8 *start, *end, *fill, *hashed;
	char line[SHA256_HEX + 4];
	s64 n;

	if (!guest_boot_ok(boot))
		return 2;
	if (boot->argc)
		return guest_fail(boot, "sha256: no arguments are taken\n", 2);

	start = (u8 *)boot->heap_base;
	end = (u8 *)guest_heap_end(boot);
	fill = hashed = start;
	sha256_init(&sha);

	while ((n = guest_read(boot, fill, (u64)(end - fill))) > 0) {
		fill += n;
		hashed += sha256_blocks(&sha, hashed, (u64)(fill - hashed));
		if (hashed == end)
			fill = hashed = start;
	}
	if (n < 0)
		return guest_fail(boot, "sha256: cannot read\n", 1);

	sha256_finish(&sha, hashed, (u64)(fill - hashed), line);
	memcpy(line + SHA256_HEX, "  -\n", 4);
	return guest_write(boot, STREAM_OUT, line, sizeof(line)) ? 1 : 0;
}
