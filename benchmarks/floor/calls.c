/*
 * Time system calls that a supervisor does not answer: calls COUNT FILTERED
 *
 * Prints the picoseconds of a getppid(), and of an anonymous mmap() with its
 * munmap().  If FILTERED is not 0, the calls pass a filter that allows
 * everything.
 */
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static long now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000 + time.tv_nsec;
}

int main(int argc, char **argv)
{
	struct sock_filter code[] = { BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW) };
	struct sock_fprog program = { 1, code };
	long count = argc == 3 ? atol(argv[1]) : 0, started, called;

	if (count < 1) {
		fprintf(stderr, "usage: calls COUNT FILTERED\n");
		return 2;
	}
	if (atoi(argv[2])) {
		prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
		if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program)) {
			perror("seccomp");
			return 1;
		}
	}
	started = now();
	for (long i = 0; i < count; i++)
		syscall(SYS_getppid);
	called = now();
	printf("%ld\n", 1000 * (called - started) / count);
	for (long i = 0; i < count; i++)
		munmap(mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 4096);
	printf("%ld\n", 1000 * (now() - called) / count);
	return 0;
}
