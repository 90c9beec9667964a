/*
 * Deliberate offences, one a run; argument 0 chooses it.  docs/use/guests.md
 * says what has to happen.  A guest that survives its offence exits with 3.
 *
 *   attribute	touch a page whose attribute names a half that its slot lacks
 *   unbacked	load from an address that no slot covers
 *   punched	read a page that the owner punched: is it zero again?
 *   divide	divide by zero
 *   loop	loop for ever, without an exit
 */
#include <restrictedmem/guest.h>

#define UNBACKED	0x30000000	/* before private memory */
#define SURVIVED	3

static int attribute(const struct boot_info *boot)
{
	u64 last = boot->shared_base + boot->shared_size - PAGE_SIZE;

	if (guest_unshare((void *)last, PAGE_SIZE))
		return guest_fail(boot, "probe: cannot convert\n", 1);
	*(volatile u64 *)last = 1;
	return SURVIVED;
}

static int punched(const struct boot_info *boot)
{
	volatile u64 *page = (volatile u64 *)boot->heap_base;

	*page = ~0UL;
	if (guest_share((void *)boot->heap_base, PAGE_SIZE) ||
	    guest_unshare((void *)boot->heap_base, PAGE_SIZE))
		return guest_fail(boot, "probe: cannot convert\n", 1);
	for (u64 i = 0; i < PAGE_SIZE / sizeof(*page); i++)
		if (page[i])
			return guest_fail(boot, "probe: old content\n", 1);
	return 0;
}

int main(const struct boot_info *boot)
{
	const char *mode = guest_argument(boot, 0);

	if (!guest_boot_ok(boot))
		return 2;
	if (mode && boot->argc == 1) {
		if (string_equal(mode, "attribute"))
			return attribute(boot);
		if (string_equal(mode, "unbacked"))
			return *(volatile u64 *)UNBACKED, SURVIVED;
		if (string_equal(mode, "punched"))
			return punched(boot);
		if (string_equal(mode, "divide")) {
			asm volatile("xorl %%eax, %%eax; divl %%eax"
				     : : : "eax", "edx", "cc");
			return SURVIVED;
		}
		if (string_equal(mode, "loop"))
			for (;;)
				asm volatile("");
	}
	return guest_fail(boot, "usage: probe attribute | unbacked | punched | "
				"divide | loop\n", 2);
}
