/*
 * Make descriptors by memfd_restricted(2) and close them: create COUNT THREADS
 *
 * Prints the nanoseconds of one descriptor: the whole time, divided by the
 * descriptors of all threads.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

static long each;

static void *create(void *unused)
{
	for (long i = 0; i < each; i++) {
		long fd = syscall(451, 0);

		if (fd < 0) {
			perror("memfd_restricted");
			exit(1);
		}
		close((int)fd);
	}
	return unused;
}

static long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000 + time.tv_nsec;
}

int main(int argc, char **argv)
{
	long threads = argc == 3 ? atol(argv[2]) : 0, started;
	pthread_t running[64];

	if (threads < 1 || threads > 64) {
		fprintf(stderr, "usage: create COUNT THREADS\n");
		return 2;
	}
	/* The first call starts the service. */
	each = 1;
	create(NULL);
	each = atol(argv[1]) / threads;
	started = now();
	for (long i = 0; i < threads; i++)
		pthread_create(&running[i], NULL, create, NULL);
	for (long i = 0; i < threads; i++)
		pthread_join(running[i], NULL);
	printf("%ld\n", (now() - started) / (each * threads));
	return 0;
}
