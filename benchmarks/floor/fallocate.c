/*
 * Time fallocate(2): fallocate FD START LENGTH COUNT PAUSE MODE...
 *
 * For each of COUNT ranges of LENGTH bytes from START on, calls fallocate(2)
 * once with each MODE, PAUSE nanoseconds after the previous call (0: at once).
 * Prints the nanoseconds of each call.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000L + time.tv_nsec;
}

int main(int argc, char **argv)
{
	struct timespec pause = { 0 };
	long *taken, start, length, calls;
	int fd, modes = argc - 6;

	if (modes < 1) {
		fprintf(stderr, "usage: fallocate FD START LENGTH COUNT PAUSE MODE...\n");
		return 2;
	}
	fd = atoi(argv[1]);
	start = atol(argv[2]);
	length = atol(argv[3]);
	calls = atol(argv[4]) * modes;
	pause.tv_nsec = atol(argv[5]);
	taken = malloc(calls * sizeof(*taken));
	if (!taken)
		return 1;
	/* Touch the memory here, so that no page fault is timed. */
	memset(taken, 1, calls * sizeof(*taken));
	for (long i = 0; i < calls; i++) {
		int mode = atoi(argv[6 + i % modes]);
		long began;

		if (pause.tv_nsec)
			nanosleep(&pause, NULL);
		began = now();
		if (fallocate(fd, mode, start + i / modes * length, length)) {
			perror("fallocate");
			return 1;
		}
		taken[i] = now() - began;
	}
	for (long i = 0; i < calls; i++)
		printf("%ld\n", taken[i]);
	return 0;
}
