/*
 * Time a punch of memory that one process has mapped: punch LENGTH
 *
 * Makes a memfd of LENGTH bytes, maps it, writes to each of its pages, punches
 * all of it with one call, and prints how many nanoseconds that took.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000L + time.tv_nsec;
}

int main(int argc, char **argv)
{
	long length = argc == 2 ? atol(argv[1]) : 0, began;
	int fd = memfd_create("floor", MFD_CLOEXEC);
	volatile char *memory;

	if (length <= 0) {
		fprintf(stderr, "usage: punch LENGTH\n");
		return 2;
	}
	if (fd < 0 || ftruncate(fd, length)) {
		perror("memfd");
		return 1;
	}
	memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (memory == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	for (long offset = 0; offset < length; offset += 4096)
		memory[offset] = 1;
	began = now();
	if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, length)) {
		perror("fallocate");
		return 1;
	}
	printf("%ld\n", now() - began);
	return 0;
}
