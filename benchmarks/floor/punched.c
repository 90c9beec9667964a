/*
 * Count page faults beside punches: punched LENGTH CHUNK THREADS MS PUNCH
 *
 * Threads go round a memfd of LENGTH bytes that this process maps, and write to
 * each page.  If PUNCH is not 0, they do so for MS milliseconds.  Meanwhile
 * another process punches CHUNK bytes at a time, round and round.  If PUNCH is
 * 0, they make one round.  Prints the faults, the nanoseconds in which they
 * were counted, and the punches.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static long length, chunk, threads, punching;
static volatile char *memory;
static volatile long *punches;
static volatile int over;

static long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000L + time.tv_nsec;
}

static long faults(void)
{
	struct rusage usage;

	getrusage(RUSAGE_SELF, &usage);
	return usage.ru_minflt;
}

static void *touch(void *unused)
{
	do {
		for (long offset = 0; offset < length; offset += 4096)
			memory[offset] = 1;
	} while (punching && !over);
	return unused;
}

static void punch_for_ever(int fd)
{
	for (long offset = 0;; offset = (offset + chunk) % length) {
		if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, chunk))
			exit(1);
		++*punches;
	}
}

int main(int argc, char **argv)
{
	int fd = memfd_create("floor", MFD_CLOEXEC);
	pthread_t thread[64];
	long began, counted;
	pid_t puncher;

	if (argc != 6 || (threads = atol(argv[3])) < 1 || threads > 64) {
		fprintf(stderr, "usage: punched LENGTH CHUNK THREADS MS PUNCH\n");
		return 2;
	}
	length = atol(argv[1]);
	chunk = atol(argv[2]);
	punching = atol(argv[5]);
	if (fd < 0 || ftruncate(fd, length)) {
		perror("memfd");
		return 1;
	}
	memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	punches = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (memory == MAP_FAILED || punches == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	puncher = punching ? fork() : -1;
	if (!puncher)
		punch_for_ever(fd);
	began = now();
	counted = faults();
	for (long i = 0; i < threads; i++)
		if (pthread_create(&thread[i], NULL, touch, NULL)) {
			perror("pthread_create");
			return 1;
		}
	if (punching)
		usleep(atol(argv[4]) * 1000);
	over = 1;
	for (long i = 0; i < threads; i++)
		pthread_join(thread[i], NULL);
	printf("%ld %ld %ld\n", faults() - counted, now() - began, *punches);
	if (puncher > 0) {
		kill(puncher, SIGKILL);
		waitpid(puncher, NULL, 0);
	}
	return 0;
}
