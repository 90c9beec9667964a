/*
 * A program of i386, without a library: what memfd_restricted, mmap, fstatfs
 * and fstatfs64 return there; a number a line.
 */
enum { WRITE = 4, EXIT = 1, MMAP = 192, FSTATFS = 100, FSTATFS64 = 269 };

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
	call(EXIT, 0, 0, 0, 0, 0);
}
