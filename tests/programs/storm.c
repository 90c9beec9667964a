/*
 * Create and close restricted descriptors, from many threads and under a timer
 * that interrupts them all the time; says what went wrong, and exits with 1.
 *
 *	storm COUNT [THREADS [MICROSECONDS]]
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

static long each;
static atomic_long ticks, failures;

static void tick(int number)
{
	(void)number;
	atomic_fetch_add(&ticks, 1);
}

static int count_open(void)
{
	DIR *directory = opendir("/proc/self/fd");
	int found = 0;

	while (readdir(directory))
		found++;
	closedir(directory);
	return found;
}

static void *create(void *unused)
{
	struct stat found;

	for (long i = 0; i < each; i++) {
		long fd = syscall(451, 0);

		if (fd < 0 || fstat((int)fd, &found) || found.st_size ||
		    !S_ISREG(found.st_mode)) {
			if (!atomic_fetch_add(&failures, 1))
				printf("call %ld: %ld, %s\n", i, fd,
				       strerror(errno));
		} else {
			close((int)fd);
		}
	}
	return unused;
}

int main(int argc, char *argv[])
{
	long threads = argc > 2 ? atol(argv[2]) : 1;
	long period = argc > 3 ? atol(argv[3]) : 0;
	struct itimerval timer = {
		.it_interval = { .tv_usec = period },
		.it_value = { .tv_usec = period },
	};
	struct sigaction action = {
		.sa_handler = tick,
		.sa_flags = SA_RESTART,
	};
	pthread_t started[256];
	int before = count_open();

	each = atol(argv[1]) / threads;
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &timer, NULL);
	for (long i = 0; i < threads; i++)
		if (pthread_create(&started[i], NULL, create, NULL))
			return 2;
	for (long i = 0; i < threads; i++)
		pthread_join(started[i], NULL);
	setitimer(ITIMER_REAL, &(struct itimerval){ 0 }, NULL);
	printf("failed %ld, left open %d, interrupted %s\n", failures,
	       count_open() - before, ticks > 100 ? "often" : "hardly");
	return failures || count_open() != before;
}
