/*
 * Run a program to its end, again and again: repeat COUNT PROGRAM [ARGUMENT...]
 *
 * Prints the microseconds of each run.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

static long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000 + time.tv_nsec / 1000;
}

int main(int argc, char **argv)
{
	if (argc < 3) {
		fprintf(stderr, "usage: repeat COUNT PROGRAM [ARGUMENT...]\n");
		return 2;
	}
	for (long i = atol(argv[1]); i > 0; i--) {
		long started = now();
		int status;
		pid_t child;

		if (posix_spawnp(&child, argv[2], NULL, NULL, argv + 2, environ) ||
		    waitpid(child, &status, 0) != child || status) {
			fprintf(stderr, "%s failed\n", argv[2]);
			return 1;
		}
		printf("%ld\n", now() - started);
	}
	return 0;
}
