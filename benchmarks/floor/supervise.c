/*
 * The least that a supervisor can do for memfd_restricted(2):
 * supervise ROOT PROGRAM [ARGUMENT...]
 *
 * Runs PROGRAM under a filter that stops system call 451.  Answers each call
 * with a file that it makes and unlinks in the directory inherited as
 * descriptor ROOT.  Wake-ups are as synchronous as the kernel can make them.
 * Ends with the program's status.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS	SECCOMP_IOW(4, __u64)
#endif
#define SYNC_WAKE_UP	1UL

static void die(const char *what)
{
	perror(what);
	exit(2);
}

static int install(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 451, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { sizeof(code) / sizeof(code[0]), code };

	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER,
			    SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
}

/* Send or receive one descriptor over a socket. */
static int pass(int sock, int fd)
{
	union {
		struct cmsghdr head;
		char bytes[CMSG_SPACE(sizeof(int))];
	} control = { 0 };
	char byte = 0;
	struct iovec data = { &byte, 1 };
	struct msghdr message = {
		.msg_iov = &data,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};

	if (fd < 0) {
		if (recvmsg(sock, &message, 0) != 1 || !CMSG_FIRSTHDR(&message))
			die("recvmsg");
		memcpy(&fd, CMSG_DATA(CMSG_FIRSTHDR(&message)), sizeof(fd));
		return fd;
	}
	control.head.cmsg_len = CMSG_LEN(sizeof(int));
	control.head.cmsg_level = SOL_SOCKET;
	control.head.cmsg_type = SCM_RIGHTS;
	memcpy(CMSG_DATA(&control.head), &fd, sizeof(fd));
	if (sendmsg(sock, &message, 0) != 1)
		die("sendmsg");
	return 0;
}

static void serve(int listener, int root)
{
	struct seccomp_notif asked;
	struct seccomp_notif_addfd answer = { .flags = SECCOMP_ADDFD_FLAG_SEND };
	int fd;

	memset(&asked, 0, sizeof(asked));
	if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &asked))
		return;
	fd = openat(root, "restrictedmem", O_RDWR | O_CREAT | O_EXCL, 0);
	if (fd < 0)
		die("openat");
	unlinkat(root, "restrictedmem", 0);
	answer.id = asked.id;
	answer.srcfd = (unsigned int)fd;
	ioctl(listener, SECCOMP_IOCTL_NOTIF_ADDFD, &answer);
	close(fd);
}

int main(int argc, char **argv)
{
	struct pollfd ready = { .events = POLLIN };
	int root = argc > 2 ? atoi(argv[1]) : -1, pair[2], status;

	if (root < 0 || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		die("usage: supervise ROOT PROGRAM [ARGUMENT...]");
	if (!fork()) {
		close(root);
		pass(pair[1], install());
		/* The descriptor number that the call returns is free again. */
		closefrom(3);
		execvp(argv[2], argv + 2);
		die(argv[2]);
	}
	ready.fd = pass(pair[0], -1);
	ioctl(ready.fd, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SYNC_WAKE_UP);
	while (poll(&ready, 1, -1) >= 0 && !(ready.revents & POLLHUP))
		serve(ready.fd, root);
	wait(&status);
	return WEXITSTATUS(status);
}
