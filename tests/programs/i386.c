/*
 * A program of i386, without a library: what memfd_restricted, both mmaps,
 * fstatfs and fstatfs64 return there; a number a line.
 */
enum {
	EXIT = 1, WRITE = 4, OPEN = 5, OLD_MMAP = 90, MPROTECT = 125,
	MMAP = 192, FSTATFS = 100, FSTATFS64 = 269,
};

enum { SHARED = 1, PRIVATE = 2, ANONYMOUS = 0x20 };

struct arguments {
	unsigned int address, length, protection, flags;
	int fd;
	unsigned int offset;
};

static int call(int nr, unsigned int a, unsigned int b, unsigned int c,
		unsigned int d, unsigned int e)
{
	int found;

	asm volatile("int $0x80" : "=a"(found)
		     : "a"(nr), "b"(a), "c"(b), "d"(c), "S"(d), "D"(e)
		     : "memory");
	return found;
}

static void say(int number)
{
	unsigned int rest = number < 0 ? -(unsigned int)number : (unsigned int)number;
	char line[16];
	int at = sizeof(line);

	line[--at] = '\n';
	do
		line[--at] = (char)('0' + rest % 10);
	while (rest /= 10);
	if (number < 0)
		line[--at] = '-';
	call(WRITE, 1, (unsigned int)(line + at), sizeof(line) - at, 0, 0);
}

/* The first mmap, whose arguments are in memory. */
static int old_mmap(struct arguments *at, unsigned int flags, int fd)
{
	struct arguments wanted = { 0, 4096, 3, flags, fd, 0 };

	*at = wanted;
	return call(OLD_MMAP, (unsigned int)at, 0, 0, 0, 0);
}

/* 0 for an address, else minus the errno. */
static void say_whether(int mapped)
{
	say(mapped < 0 && mapped > -4096 ? mapped : 0);
}

static void say_old_mmap(int fd)
{
	int plain = call(OPEN, (unsigned int)"/proc/self/exe", 0, 0, 0, 0);
	struct arguments arguments, *page;

	page = (void *)old_mmap(&arguments, PRIVATE | ANONYMOUS, -1);
	say_whether((int)page);
	say_whether(old_mmap(&arguments, PRIVATE, plain));
	say_whether(old_mmap(&arguments, PRIVATE | ANONYMOUS, fd));
	say_whether(old_mmap(&arguments, SHARED, fd));
	say_whether(old_mmap(&arguments, PRIVATE, fd));
	say_whether(old_mmap(page, PRIVATE, fd));
	call(MPROTECT, (unsigned int)page, 4096, 0, 0, 0);
	say_whether(call(OLD_MMAP, (unsigned int)page, 0, 0, 0, 0));
	say_whether(call(OLD_MMAP, 8, 0, 0, 0, 0));
}

void _start(void)
{
	unsigned int buffer[32] = { 0 };
	int fd = call(451, 0, 99, 98, 97, 96);

	say(fd);
	say(call(451, 4, 0, 0, 0, 0));
	/* mmap2(NULL, 4096, PROT_READ, MAP_PRIVATE, fd, 0), the offset in ebp */
	say(call(MMAP, 0, 4096, 1, 2, (unsigned int)fd));
	say(call(FSTATFS, (unsigned int)fd, (unsigned int)buffer, 0, 0, 0));
	say((int)buffer[0]);
	buffer[0] = 0;
	say(call(FSTATFS64, (unsigned int)fd, 84, (unsigned int)buffer, 0, 0));
	say((int)buffer[0]);
	say(call(FSTATFS64, (unsigned int)fd, 80, (unsigned int)buffer, 0, 0));
	say_old_mmap(fd);
	call(EXIT, 0, 0, 0, 0, 0);
}
