/*
 * Touch pages of private memory on every vCPU, in an order that follows from a
 * seed, while the owner punches them; and check that no word read is older
 * than it may be.
 *
 *   churn SEED PAGES STEPS [CONVERT]
 *
 * The guest uses PAGES pages at the heap's end, from a multiple of 2 MiB on.
 * vCPU 0 ends the guest after STEPS steps (0: never), or when the owner sets
 * stop.  CONVERT of 1000 steps make their page shared and private again.
 *
 * The owner announces its punches on a board in the shared window, with a lane
 * for each of its processes.  A lane's generation only rises.  The process
 * writes it to begun[lane][page] before it punches a page, and to
 * done[lane][page] afterwards.
 *
 * A stamp has a word for each lane, made of the page's number and the value of
 * begun[].  The guest writes the stamp again if begun[] has changed meanwhile,
 * so the stamp was there before any later generation began.  Hence a word is
 * stale if it is older than done[] as read before the word.  A word is lost if
 * it is gone, begun[] has not changed, and that generation was done when the
 * word was written.
 *
 * The owner punches the private half.  So in a shared page a word can only be
 * lost, not stale.  exposed[page] is odd while the owner has made the page
 * shared without being asked.
 *
 * A second range comes and goes at EXTRA_BASE.  While extra is not 0, a vCPU
 * that is counted in extra_users may touch it.  Each time it is another file,
 * which nobody has written.
 *
 * Prints the reason and exits with 1 at the first page that is wrong.
 */
#include <restrictedmem/guest.h>

#include "lines.h"

#define LANES		2
#define MAX_PAGES	8192
#define MAX_VCPUS	64
#define EXTRA_BASE	0x80000000
#define EXTRA_PAGES	64
#define BLOCK		0x200000	/* 2 MiB */
#define APART		(PAGE_SIZE / LANES / sizeof(u64))

/* At page 1 of the shared window; page 0 is for output. */
struct board {
	volatile u32 stop, extra, extra_users, reserved;
	volatile u64 steps[MAX_VCPUS];
	volatile u32 begun[LANES][MAX_PAGES];
	volatile u32 done[LANES][MAX_PAGES];
	volatile u32 exposed[MAX_PAGES];
};

_Static_assert(sizeof(struct board) == 164368, "the owner writes it, too");

/* The guest's record of a page; the vCPU that set locked owns the page. */
struct page {
	volatile u32 locked;
	u32 kept;		/* no punch was under way as it was written */
	u32 begun[LANES];	/* begun[] as in its words */
};

static struct page pages[MAX_PAGES];
static struct board *board;
static volatile u64 *memory;
static volatile u32 failed;
static u64 seed, npages, convert;

static u64 next(u64 *state)
{
	u64 z = *state += 0x9e3779b97f4a7c15;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

static u32 exchange(volatile u32 *at, u32 value)
{
	asm volatile("xchgl %0, %1" : "+r"(value), "+m"(*at) : : "memory");
	return value;
}

static void add(volatile u32 *at, u32 value)
{
	asm volatile("lock addl %1, %0" : "+m"(*at) : "r"(value) : "cc", "memory");
}

/* A store that is visible before any later load. */
static void store(volatile u64 *at, u64 value)
{
	asm volatile("xchgq %0, %1" : "+r"(value), "+m"(*at) : : "memory");
}

static volatile u64 *word_of(u64 p, int lane)
{
	return memory + p * (PAGE_SIZE / sizeof(u64)) + (u64)lane * APART;
}

static u64 stamp(u64 p, u32 generation)
{
	return (p + 1) << 32 | generation;
}

static int fail(const struct boot_info *boot, const char *what, u64 p,
		u64 found, u64 expected)
{
	char line[160], *to = line;

	if (exchange(&failed, 1))
		return 0;
	to = put_decimal(put_string(put_string(to, what), ": page "), p);
	to = put_hex(put_string(to, " holds "), found);
	to = put_hex(put_string(to, ", expected "), expected);
	*to++ = '\n';
	guest_write(boot, STREAM_OUT, line, (u64)(to - line));
	guest_exit(1);
}

/* No punch was under way when @begun was read, and none has begun since. */
static int quiet(u64 p, const u32 begun[LANES], int was_done)
{
	for (int lane = 0; lane < LANES; lane++)
		was_done &= board->begun[lane][p] == begun[lane];
	return was_done;
}

/* The owner has not exposed the page since @exposed was read. */
static int still_hidden(u64 p, u32 exposed)
{
	return !(exposed & 1) && board->exposed[p] == exposed;
}

static int read_begun(u64 p, u32 begun[LANES])
{
	int all_done = 1;

	for (int lane = 0; lane < LANES; lane++) {
		begun[lane] = board->begun[lane][p];
		all_done &= board->done[lane][p] == begun[lane];
	}
	return all_done;
}

/* The functions below return true when all is well. */

static int look(const struct boot_info *boot, u64 p, int private)
{
	const struct page *page = &pages[p];
	u32 done[LANES], exposed = board->exposed[p];
	u64 found[LANES];
	int kept;

	for (int lane = 0; lane < LANES; lane++)
		done[lane] = board->done[lane][p];
	for (int lane = 0; lane < LANES; lane++)
		found[lane] = *word_of(p, lane);
	kept = quiet(p, page->begun, (int)page->kept);
	private &= still_hidden(p, exposed);
	for (int lane = 0; lane < LANES; lane++) {
		u64 expected = stamp(p, page->begun[lane]);

		if (kept && found[lane] != expected)
			return fail(boot, "lost", p, found[lane], expected);
		if (found[lane] && found[lane] >> 32 != p + 1)
			return fail(boot, "mixed up", p, found[lane], expected);
		if (private && found[lane] && (u32)found[lane] < done[lane])
			return fail(boot, "stale", p, found[lane],
				    stamp(p, done[lane]));
	}
	return 1;
}

static void write(u64 p)
{
	struct page *page = &pages[p];

	do {
		page->kept = (u32)read_begun(p, page->begun);
		for (int lane = 0; lane < LANES; lane++)
			store(word_of(p, lane), stamp(p, page->begun[lane]));
	} while (!quiet(p, page->begun, 1));
}

/* Nobody writes to this half of the page meanwhile. */
static int new(const struct boot_info *boot, u64 p, u32 exposed,
	       const char *otherwise)
{
	for (int lane = 0; lane < LANES; lane++) {
		u64 found = *word_of(p, lane);

		if (found && still_hidden(p, exposed))
			return fail(boot, otherwise, p, found, 0);
	}
	return 1;
}

/* Make a page shared and private again: it has new zeroes both times. */
static int there_and_back(const struct boot_info *boot, u64 p)
{
	const void *start = (const void *)word_of(p, 0);
	u32 exposed = board->exposed[p];

	if (guest_share(start, PAGE_SIZE))
		return fail(boot, "cannot be shared", p, 0, 0);
	if (!new(boot, p, exposed, "shared, and not new"))
		return 0;
	write(p);
	if (!look(boot, p, 0))
		return 0;
	if (guest_unshare(start, PAGE_SIZE))
		return fail(boot, "cannot be private", p, 0, 0);
	pages[p].kept = 0;
	return new(boot, p, exposed, "private, and not new");
}

static int touch_extra(const struct boot_info *boot, u64 random)
{
	u64 p = random % EXTRA_PAGES, expected, found = 0;
	volatile u64 *at = (volatile u64 *)(EXTRA_BASE + p * PAGE_SIZE);
	u32 extra;

	add(&board->extra_users, 1);
	extra = board->extra;
	expected = stamp(p, extra);
	if (extra) {
		found = *at;
		*at = expected;
	}
	add(&board->extra_users, (u32)-1);
	return !found || found == expected ||
	       fail(boot, "another file's", p, found, expected);
}

static int step(const struct boot_info *boot, u64 *state)
{
	u64 random = next(state), p = (random >> 32) % npages;
	int good;

	if (random % 16 == 0 && !touch_extra(boot, random >> 4))
		return 0;
	/* Another vCPU owns this page; there are other pages. */
	if (exchange(&pages[p].locked, 1))
		return 1;
	good = look(boot, p, 1);
	if (good && random % 1000 < convert)
		good = there_and_back(boot, p);
	if (good && (random & 1 << 10))
		write(p);
	pages[p].locked = 0;
	return good;
}

static int run(const struct boot_info *boot, u64 index, u64 steps)
{
	u64 state = seed + (index << 32);

	for (u64 i = 0; !board->stop && (!steps || i < steps); i++) {
		if (!step(boot, &state))
			return 1;
		board->steps[index % MAX_VCPUS] = i + 1;
	}
	return 0;
}

/* vCPUs that came earlier use the number already; it is the same each time. */
static int parse(const char *s, u64 *number)
{
	u64 n = 0;

	if (!s || !*s)
		return 0;
	for (; *s >= '0' && *s <= '9'; s++)
		n = n * 10 + (u64)(*s - '0');
	*number = n;
	return !*s;
}

/* Each vCPU runs this, with the same result. */
static int begin(const struct boot_info *boot, u64 *steps)
{
	u64 end = guest_heap_end(boot), start;

	if (boot->argc < 3 || boot->argc > 4 ||
	    !parse(guest_argument(boot, 0), &seed) ||
	    !parse(guest_argument(boot, 1), &npages) ||
	    !parse(guest_argument(boot, 2), steps) ||
	    (boot->argc == 4 && !parse(guest_argument(boot, 3), &convert)) ||
	    !npages || npages > MAX_PAGES)
		return 0;
	start = (end - npages * PAGE_SIZE) & ~(u64)(BLOCK - 1);
	if (start < boot->heap_base || start > end)
		return 0;
	memory = (volatile u64 *)start;
	board = (struct board *)(boot->shared_base + PAGE_SIZE);
	return boot->shared_size >= PAGE_SIZE + sizeof(*board);
}

int secondary(const struct boot_info *boot, u64 index)
{
	u64 steps;

	if (begin(boot, &steps))
		run(boot, index, 0);
	return 0;
}

int main(const struct boot_info *boot)
{
	u64 steps;

	if (!guest_boot_ok(boot))
		return 2;
	if (!begin(boot, &steps))
		return guest_fail(boot, "usage: churn SEED PAGES STEPS "
				  "[CONVERT]; up to 8192 pages that fit, "
				  "CONVERT of 1000\n", 2);
	return run(boot, 0, steps);
}
