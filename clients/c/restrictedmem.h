/*
 * A VM on restricted memory, for owners written in C11 or C++11: the protocol
 * of docs/reference/wire-protocol.md, which is KVM's ioctls as messages.
 *
 * One header and libc, nothing to link.  Compile as gnu11, or define
 * _GNU_SOURCE before the first include.
 *
 * Every function returns 0 or a negative errno; the handle's socket.error then
 * names the call and says what the other end said.  -ENOTCONN means of every
 * call that the other end is gone, -EPROTO that it answered nonsense.
 *
 * What is passed in stays the caller's.  What is handed out, descriptor or
 * handle, is the caller's to close, and close-on-exec; after an error it is
 * nothing.  Addresses, sizes and offsets are bytes.  A handle is for one thread
 * at a time: each vCPU has its own, and if their threads share the VM's, it is
 * theirs to lock.  No call is cut short by a signal.
 */
#ifndef RESTRICTEDMEM_H
#define RESTRICTEDMEM_H

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

/* Calls: owner to service, the service's first message, owner to engine. */
#define RMEM_CONNECT			1
#define RMEM_TOKEN			2
#define RMEM_SPAWN			3
#define RMEM_SIGNING_KEY		5
#define RMEM_READY			0x10000
#define RMEM_SET_USER_MEMORY_REGION	0x4020ae46
#define RMEM_SET_MEMORY_ATTRIBUTES	0x4020aed2
#define RMEM_MEMORY_ENCRYPT_REG_REGION	0x8010aebb
#define RMEM_MEMORY_ENCRYPT_UNREG_REGION 0x8010aebc
#define RMEM_CREATE_VCPU		0xae41
#define RMEM_CHECK_EXTENSION		0xae03
#define RMEM_GET_SUPPORTED_MEMORY_ATTRIBUTES 0x8008aed2
#define RMEM_LAUNCH_UPDATE		0x10001
#define RMEM_STATISTICS			0x10002
#define RMEM_LAUNCH_FINISH		0x10003
#define RMEM_INTERRUPT			0x10004
#define RMEM_SET_REGS			0x4090ae82
#define RMEM_RUN			0xae80
#define RMEM_PRE_FAULT_MEMORY		0xc040aed5

/* ioctl of a restricted descriptor: show a token to its service. */
#define RMEM_PROVE			0x40105201

/* Flags of a slot, of a page, of an exit, of a VM. */
#define RMEM_MEM_READONLY		(1U << 1)
#define RMEM_MEM_PRIVATE		(1U << 2)
#define RMEM_MEMORY_ATTRIBUTE_PRIVATE	(1U << 3)
#define RMEM_MEMORY_EXIT_FLAG_PRIVATE	(1U << 3)
#define RMEM_POLICY_DEBUG		(1U << 0)
#define RMEM_POLICY_EXPLICIT		(1U << 1)

/* exit_reason */
#define RMEM_EXIT_UNKNOWN		0
#define RMEM_EXIT_IO			2
#define RMEM_EXIT_HYPERCALL		3
#define RMEM_EXIT_MMIO			6
#define RMEM_EXIT_SHUTDOWN		8
#define RMEM_EXIT_INTR			10
#define RMEM_EXIT_MEMORY_FAULT		39

#define RMEM_PAGE_SIZE			4096
#define RMEM_TOKEN_SIZE			16
#define RMEM_MEASUREMENT_SIZE		48
#define RMEM_CONNECT_KEY_SIZE		16
#define RMEM_KEY_SIZE			32
#define RMEM_MAX_MESSAGE		(128 << 10)
#define RMEM_START_SECONDS		30

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD			77	/* Linux 6.5 */
#endif

/* v10's struct kvm_userspace_memory_region_ext. */
struct rmem_userspace_memory_region_ext {
	uint32_t slot;
	uint32_t flags;			/* RMEM_MEM_* */
	uint64_t guest_phys_addr;
	uint64_t memory_size;		/* 0 deletes the slot */
	uint64_t userspace_addr;	/* where the shared half starts in its memfd */
	uint64_t restricted_offset;
	uint32_t restricted_fd;		/* not looked at: a token says it */
	uint32_t pad1;
	uint64_t pad2[14];
};

/* v10's struct kvm_memory_attributes. */
struct rmem_memory_attributes {
	uint64_t address;
	uint64_t size;
	uint64_t attributes;		/* RMEM_MEMORY_ATTRIBUTE_PRIVATE or 0 */
	uint64_t flags;			/* 0 */
};

/* struct kvm_enc_region; v9 takes a guest physical address. */
struct rmem_enc_region {
	uint64_t addr;
	uint64_t size;
};

/* struct kvm_pre_fault_memory, whose name is a function here. */
struct rmem_pre_fault_range {
	uint64_t gpa;
	uint64_t size;
	uint64_t flags;			/* 0 */
	uint64_t padding[5];		/* 0 */
};

/* struct kvm_regs of x86-64. */
struct rmem_regs {
	uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
	uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
	uint64_t rip, rflags;
};

struct rmem_exit_io {
	uint64_t port, size, data;
};

struct rmem_exit_hypercall {
	uint64_t nr, args[4];
};

struct rmem_exit_mmio {
	uint64_t gpa, size, data;
};

struct rmem_exit_memory_fault {
	uint64_t flags, gpa, size, error;
};

/* Why a vCPU came back.  Take a reason that is not listed as UNKNOWN. */
struct rmem_exit {
	uint32_t exit_reason;
	uint32_t flags;			/* IO, MMIO: 1 for an out or a write */
	union {
		uint64_t words[6];
		struct rmem_exit_io io;			/* in: run's value */
		struct rmem_exit_hypercall hypercall;	/* run's value: rax */
		struct rmem_exit_mmio mmio;		/* read: run's value */
		struct rmem_exit_memory_fault memory_fault;
		uint64_t vector;			/* SHUTDOWN */
		uint64_t reason;			/* UNKNOWN */
	};
};

static_assert(sizeof(struct rmem_userspace_memory_region_ext) == 160, "ABI");
static_assert(sizeof(struct rmem_memory_attributes) == 32, "ABI");
static_assert(sizeof(struct rmem_enc_region) == 16, "ABI");
static_assert(sizeof(struct rmem_pre_fault_range) == 64, "ABI");
static_assert(sizeof(struct rmem_regs) == 144, "ABI");
static_assert(sizeof(struct rmem_exit) == 56, "ABI");

/* One end of a connection; error is the text of the last call that failed. */
struct rmem_socket {
	int fd;
	const char *call;
	char error[512];
};

/* Its service lives while this, a descriptor or a VM of it is open. */
struct rmem_service {
	struct rmem_socket socket;
	int root;			/* its mount, O_PATH */
	int witness;			/* a socket: SO_PEERCRED is its own */
	char api[8];			/* "v9" or "v10" */
	char address[108];		/* where it listens, and the key */
	unsigned char key[RMEM_CONNECT_KEY_SIZE];
};

/* A VM lives while this or any of its vCPUs is open. */
struct rmem_vm {
	struct rmem_socket socket;
};

struct rmem_vcpu {
	struct rmem_socket socket;
	uint64_t number;
};

/* Messages. */

static inline int rmem_fail(struct rmem_socket *s, int error, const char *words)
{
	snprintf(s->error, sizeof(s->error), "%s%s%s", s->call,
		 *words ? ": " : "", words);
	return -error;
}

static inline void rmem_close(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* Send a request whose body is in two pieces, with a descriptor if fd >= 0. */
static inline int rmem_send(struct rmem_socket *s, const char *call,
			    uint32_t number, const void *body, size_t size,
			    const void *more, size_t more_size, int fd)
{
	uint32_t head[2] = { number, 0 };
	struct iovec pieces[3] = {
		{ head, sizeof(head) },
		{ (void *)(uintptr_t)body, size },
		{ (void *)(uintptr_t)more, more_size },
	};
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(sizeof(int))];
	} rights;
	struct msghdr message;

	s->call = call;
	s->error[0] = 0;
	memset(&message, 0, sizeof(message));
	message.msg_iov = pieces;
	message.msg_iovlen = 3;
	if (fd >= 0) {
		memset(&rights, 0, sizeof(rights));
		rights.header.cmsg_level = SOL_SOCKET;
		rights.header.cmsg_type = SCM_RIGHTS;
		rights.header.cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(&rights.header), &fd, sizeof(int));
		message.msg_control = rights.space;
		message.msg_controllen = sizeof(rights.space);
	}
	while (sendmsg(s->fd, &message, MSG_NOSIGNAL) < 0) {
		if (errno == EPIPE || errno == ECONNRESET)
			return rmem_fail(s, ENOTCONN, "the other end is gone");
		if (errno != EINTR)
			return rmem_fail(s, errno, "sendmsg");
	}
	return 0;
}

/* Take the descriptors of a message: the first are the caller's, if wanted. */
static inline void rmem_take_fds(struct msghdr *message, int *fds, int wanted)
{
	struct cmsghdr *c;
	int got, taken = 0;

	for (c = CMSG_FIRSTHDR(message); c; c = CMSG_NXTHDR(message, c)) {
		unsigned char *data = CMSG_DATA(c);
		unsigned char *end = (unsigned char *)c + c->cmsg_len;

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		for (; data + sizeof(int) <= end; data += sizeof(int)) {
			memcpy(&got, data, sizeof(int));
			if (taken < wanted)
				fds[taken++] = got;
			else
				close(got);
		}
	}
}

/*
 * Receive a message: its first word, at most *size bytes of body (*size
 * becomes their number), and as many descriptors as are wanted, -1 for those
 * that did not come.  What does not fit the body goes to spill, which is large
 * enough for the words of an error.
 */
static inline int rmem_receive(struct rmem_socket *s, uint32_t *number,
			       void *body, size_t *size, char spill[1024],
			       size_t *spilt, int *fds, int wanted)
{
	uint32_t head[2] = { 0, 0 };
	struct iovec pieces[3] = {
		{ head, sizeof(head) }, { body, *size }, { spill, 1024 },
	};
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(4 * sizeof(int))];
	} rights;
	struct msghdr message;
	ssize_t got;
	int i, rc;

	for (i = 0; i < wanted; i++)
		fds[i] = -1;
	memset(&message, 0, sizeof(message));
	message.msg_iov = pieces;
	message.msg_iovlen = 3;
	message.msg_control = rights.space;
	message.msg_controllen = sizeof(rights.space);
	do
		got = recvmsg(s->fd, &message, MSG_CMSG_CLOEXEC);
	while (got < 0 && errno == EINTR);
	if (!got || (got < 0 && errno == ECONNRESET))
		return rmem_fail(s, ENOTCONN, "the other end is gone");
	if (got < 0) {
		rc = rmem_fail(s, errno, "recvmsg");
		/* It may still come, and is no later call's reply. */
		rmem_close(&s->fd);
		return rc;
	}
	rmem_take_fds(&message, fds, wanted);
	if (got < (ssize_t)sizeof(head) ||
	    message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) {
		for (i = 0; i < wanted; i++)
			rmem_close(&fds[i]);
		return rmem_fail(s, EPROTO, "message of another length");
	}
	*number = head[0];
	*spilt = (size_t)got - sizeof(head);
	*size = *spilt < *size ? *spilt : *size;
	*spilt -= *size;
	return 0;
}

/* Turn an error in place of what was expected into -errno and its words. */
static inline int rmem_refused(struct rmem_socket *s, uint32_t error,
			       const void *body, size_t size, const char *spill,
			       size_t spilt)
{
	char words[sizeof(s->error) - 64];	/* which the name needs */

	snprintf(words, sizeof(words), "%.*s%.*s", (int)size,
		 size ? (const char *)body : "", (int)spilt, spill);
	return rmem_fail(s, error && error < 4096 ? (int)error : EPROTO, words);
}

/* Wait for a reply of at most *size bytes, which becomes their number. */
static inline int rmem_reply_upto(struct rmem_socket *s, void *body,
				  size_t *size, int *fd)
{
	char spill[1024];
	uint32_t error;
	size_t spilt;
	int rc = rmem_receive(s, &error, body, size, spill, &spilt, fd, !!fd);

	if (rc)
		return rc;
	if (error)
		rc = rmem_refused(s, error, body, *size, spill, spilt);
	else if (spilt)
		rc = rmem_fail(s, EPROTO, "reply is too long");
	else if (fd && *fd < 0)
		rc = rmem_fail(s, EPROTO, "reply without its descriptor");
	if (rc && fd)
		rmem_close(fd);
	return rc;
}

/* Wait for a reply of exactly size bytes. */
static inline int rmem_reply(struct rmem_socket *s, void *body, size_t size,
			     int *fd)
{
	size_t got = size;
	int rc = rmem_reply_upto(s, body, &got, fd);

	if (rc || got == size)
		return rc;
	if (fd)
		rmem_close(fd);
	return rmem_fail(s, EPROTO, "reply is too short");
}

/* A request and its reply, neither with descriptors. */
static inline int rmem_call(struct rmem_socket *s, const char *call,
			    uint32_t number, const void *body, size_t size,
			    void *reply, size_t reply_size)
{
	int rc = rmem_send(s, call, number, body, size, NULL, 0, -1);

	return rc ? rc : rmem_reply(s, reply, reply_size, NULL);
}

/* The service. */

static inline void rmem_service_close(struct rmem_service *service)
{
	rmem_close(&service->socket.fd);
	rmem_close(&service->root);
	rmem_close(&service->witness);
}

/*
 * Whether a uid is one user's.  In a user namespace all that are not mapped
 * there look like the overflow uid.
 */
static inline int rmem_uid_is_known(uid_t uid)
{
	unsigned long long overflow = 65534, count, mapped = 0;
	FILE *file = fopen("/proc/sys/kernel/overflowuid", "re");

	if (file) {
		if (fscanf(file, "%llu", &overflow) != 1)
			overflow = 65534;
		fclose(file);
	}
	if (uid != overflow)
		return 1;
	file = fopen("/proc/self/uid_map", "re");
	if (!file)
		return 0;
	while (fscanf(file, "%*u %*u %llu", &count) == 1)
		mapped += count;
	fclose(file);
	return mapped >= 0xffffffffULL;
}

/* struct ucred, which libc hides. */
struct rmem_peer {
	int32_t pid;
	uint32_t uid, gid;
};

static inline int rmem_peer_of(int fd, struct rmem_peer *peer)
{
	socklen_t size = (socklen_t)sizeof(*peer);

	memset(peer, 0, sizeof(*peer));
	return getsockopt(fd, SOL_SOCKET, SO_PEERCRED, peer, &size);
}

/* The inode of a pidfd, which this closes; 0 where there is none. */
static inline ino_t rmem_pidfd_inode(int pidfd)
{
	struct stat found;
	int rc = fstat(pidfd, &found);

	rmem_close(&pidfd);
	return rc ? 0 : found.st_ino;
}

static inline ino_t rmem_peer_inode(int fd)
{
	socklen_t size = (socklen_t)sizeof(int);
	int pidfd = -1;

	if (getsockopt(fd, SOL_SOCKET, SO_PEERPIDFD, &pidfd, &size))
		return 0;
	return rmem_pidfd_inode(pidfd);
}

/*
 * Whether one user's process has made the other ends of two connections.  If
 * that user's uid is not known here, pidfds have to tell (Linux 6.9): before,
 * all have one inode.
 */
static inline int rmem_is_same_peer(int one, int other)
{
	struct rmem_peer ones, others;
	ino_t inode;

	if (rmem_peer_of(one, &ones) || rmem_peer_of(other, &others) ||
	    memcmp(&ones, &others, sizeof(ones)))
		return 0;
	if (rmem_uid_is_known(ones.uid))
		return 1;
	inode = rmem_peer_inode(one);
	return inode && inode == rmem_peer_inode(other) &&
	       inode != rmem_pidfd_inode((int)syscall(SYS_pidfd_open,
						      getpid(), 0));
}

/* Connect to a socket by its path, or by its abstract name after an @. */
static inline int rmem_connect(struct rmem_socket *s, const char *path)
{
	struct sockaddr_un name;
	socklen_t size = (socklen_t)sizeof(name);
	int rc;

	memset(&name, 0, sizeof(name));
	name.sun_family = AF_UNIX;
	if (strlen(path) >= sizeof(name.sun_path))
		return rmem_fail(s, ENAMETOOLONG, path);
	strcpy(name.sun_path, path);
	if (path[0] == '@') {
		name.sun_path[0] = 0;
		size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) +
				   strlen(path));
	}
	s->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (s->fd < 0)
		return rmem_fail(s, errno, "socket");
	if (!connect(s->fd, (const struct sockaddr *)&name, size))
		return 0;
	rc = rmem_fail(s, errno, path);
	rmem_close(&s->fd);
	return rc;
}

/*
 * Take a connection of this process's own (CONNECT).  For a child that has
 * inherited the handle by fork: two readers of one socket would take each
 * other's replies.
 *
 * -ENOTCONN when the service is gone.
 */
static inline int rmem_service_after_fork(struct rmem_service *service)
{
	struct rmem_socket *s = &service->socket;
	int rc = 0, tries;

	/* Connections of others, without the key, may push this one out. */
	for (tries = 0; tries < 8; tries++) {
		rmem_close(&s->fd);
		s->call = "CONNECT";
		rc = rmem_connect(s, service->address);
		if (rc == -ECONNREFUSED ||
		    (!rc && !rmem_is_same_peer(s->fd, service->witness)))
			rc = rmem_fail(s, ENOTCONN, "the service is gone");
		if (rc) {
			rmem_close(&s->fd);
			return rc;
		}
		rc = rmem_call(s, "CONNECT", RMEM_CONNECT, service->key,
			       sizeof(service->key), NULL, 0);
		if (rc != -ENOTCONN)
			break;
	}
	if (rc)
		rmem_close(&s->fd);
	return rc;
}

/* Find a string in the JSON object that READY carries; "" without it. */
static inline void rmem_json_string(const char *json, const char *name,
				    char *value, size_t size)
{
	const char *at = strstr(json, name);
	size_t length;

	value[0] = 0;
	if (!at)
		return;
	at += strlen(name);
	at += strspn(at, "\": \t");
	length = strcspn(at, "\"");
	if (length < size) {
		memcpy(value, at, length);
		value[length] = 0;
	}
}

/* Read the key, in hexadecimal digits. */
static inline int rmem_read_key(struct rmem_service *service, const char *json)
{
	char digits[2 * RMEM_CONNECT_KEY_SIZE + 1];
	unsigned int byte;
	size_t at;

	rmem_json_string(json, "\"key\"", digits, sizeof(digits));
	for (at = 0; at < RMEM_CONNECT_KEY_SIZE; at++) {
		if (sscanf(digits + 2 * at, "%2x", &byte) != 1)
			return rmem_fail(&service->socket, EPROTO, "no key");
		service->key[at] = (unsigned char)byte;
	}
	return 0;
}

/* Wait on a socket, which this closes, for a service to say READY. */
static inline int rmem_service_take(struct rmem_service *service, int first)
{
	struct pollfd ready = { first, POLLIN, 0 };
	char json[4096], spill[1024];
	size_t size = sizeof(json) - 1, spilt;
	uint32_t number = 0;
	int rc, fds[2] = { -1, -1 };

	service->socket.fd = first;
	do
		rc = poll(&ready, 1, RMEM_START_SECONDS * 1000);
	while (rc < 0 && errno == EINTR);
	if (rc <= 0)
		rc = rmem_fail(&service->socket, rc ? errno : ETIMEDOUT,
			       "the service says nothing");
	else
		rc = rmem_receive(&service->socket, &number, json, &size, spill,
				  &spilt, fds, 2);
	service->root = fds[0];
	service->witness = fds[1];
	if (!rc && (number != RMEM_READY || service->witness < 0))
		rc = rmem_refused(&service->socket, number, json, size, spill,
				  spilt);
	if (!rc) {
		json[size] = 0;
		rmem_json_string(json, "\"api\"", service->api,
				 sizeof(service->api));
		rmem_json_string(json, "\"socket\"", service->address,
				 sizeof(service->address));
		rc = rmem_read_key(service, json);
	}
	if (!rc)
		rc = rmem_service_after_fork(service);
	if (rc)
		rmem_service_close(service);
	return rc;
}

static inline void rmem_service_init(struct rmem_service *service,
				     const char *call)
{
	memset(service, 0, sizeof(*service));
	service->socket.call = call;
	service->socket.fd = service->root = service->witness = -1;
}

/*
 * Get a service from `restrictedmem serve --socket path`, under another uid:
 * what an owner needs whom nobody should have to trust.  Or be let into that
 * of `restrictedmem exec`: a path that begins with @ is an abstract name, which
 * has to be this user's.
 *
 * -ENAMETOOLONG; -ENOENT, -ECONNREFUSED, -EACCES as connect(2); -EACCES for
 * another user's name; -ETIMEDOUT after RMEM_START_SECONDS; what kept the
 * service from starting.
 */
static inline int rmem_service_connect(struct rmem_service *service,
				       const char *path)
{
	struct rmem_peer peer;
	int rc;

	rmem_service_init(service, "connect");
	rc = rmem_connect(&service->socket, path);
	if (!rc && path[0] == '@' &&
	    (rmem_peer_of(service->socket.fd, &peer) || peer.uid != geteuid() ||
	     !rmem_uid_is_known(peer.uid))) {
		rmem_close(&service->socket.fd);
		rc = rmem_fail(&service->socket, EACCES, "another user's name");
	}
	return rc ? rc : rmem_service_take(service, service->socket.fd);
}

/* The child of rmem_service_start: async-signal-safe calls only, then exec. */
static inline void rmem_service_exec(int socket, const char *python,
				     char *const arguments[], char *path)
{
	char *const environment[] = { path, NULL };
	int null = open("/dev/null", O_RDWR), fd;

	/* Above what it will be, whatever this process has open below. */
	socket = fcntl(socket, F_DUPFD, 10);
	for (fd = 0; fd < 3; fd++)
		dup2(null, fd);
	dup2(socket, 3);
	syscall(SYS_close_range, 4, ~0U, 0);
	execve(python, arguments, environment);
	_exit(127);
}

/*
 * Start a private service, which ends with the last of what it made.
 *
 * python is the path of an interpreter that has the package restrictedmem
 * (-I: neither PYTHON* nor the current directory choose what it imports), api
 * the posting to follow, "v9" or "v10".  The service starts with no descriptor
 * of this process but its socket.
 *
 * -ECONNRESET when it died without a word, for instance for want of python or
 * package; -ETIMEDOUT after RMEM_START_SECONDS; what else kept it from
 * starting, -EACCES for /dev/fuse, say: `restrictedmem doctor` knows more.
 */
static inline int rmem_service_start(struct rmem_service *service,
				     const char *python, const char *api)
{
	static const char program[] =
		"import sys; from restrictedmem.service.start import main; "
		"main(sys.argv[1:])";
	const char *path = getenv("PATH");
	char options[128], variable[4096];
	const char *arguments[] = { python, "-I", "-c", program, "3", options,
				    NULL };
	int pair[2], rc;
	pid_t child;

	rmem_service_init(service, "start");
	snprintf(options, sizeof(options),
		 "{\"api\": \"%s\", \"become\": null}", api);
	snprintf(variable, sizeof(variable), "PATH=%s",
		 path ? path : "/usr/bin:/bin");
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		return rmem_fail(&service->socket, errno, "socketpair");
	child = fork();
	if (!child)
		rmem_service_exec(pair[1], python, (char *const *)arguments,
				  variable);
	rc = child < 0 ? rmem_fail(&service->socket, errno, "fork") : 0;
	close(pair[1]);
	if (rc) {
		close(pair[0]);
		return rc;
	}
	rc = rmem_service_take(service, pair[0]);
	/* Its work is done, or it hangs. */
	kill(child, SIGKILL);
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
	return rc == -ENOTCONN ? -ECONNRESET : rc;
}

/*
 * Create a restricted descriptor: memfd_restricted(2).  Size it once by
 * ftruncate; allocate and punch by fallocate; nothing reads, writes or maps it.
 *
 * -ENFILE, -EMFILE; -ENOTCONN when the service is gone.
 */
static inline int rmem_memfd_restricted(struct rmem_service *service, int *fd)
{
	static const char name[] = "restrictedmem";
	int rc;

	service->socket.call = "memfd_restricted";
	*fd = openat(service->root, name,
		     O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
	if (*fd < 0)
		return rmem_fail(&service->socket, errno, "");
	/* Names are not cached: that none is found is what unlink is for. */
	if (unlinkat(service->root, name, 0) && errno != ENOENT) {
		rc = rmem_fail(&service->socket, errno, "unlinkat");
		rmem_close(fd);
		return rc;
	}
	return 0;
}

/*
 * Show the service that this process holds a restricted descriptor; the token
 * makes one slot of it, once, of whichever VM it is given to.
 *
 * -EBADF; -ENOTTY for another kind of file; -EACCES for a descriptor of
 * another service.  The oldest of 64 that were never used makes room.
 */
static inline int rmem_token(struct rmem_service *service, int fd,
			     unsigned char token[RMEM_TOKEN_SIZE])
{
	int rc = rmem_call(&service->socket, "TOKEN", RMEM_TOKEN, NULL, 0,
			   token, RMEM_TOKEN_SIZE);

	if (!rc && ioctl(fd, RMEM_PROVE, token) < 0)
		rc = rmem_fail(&service->socket, errno,
			       "not a restricted descriptor of this service");
	return rc;
}

/*
 * Get the public key (Ed25519) that this service signs reports with.
 *
 * -ENOSYS when the service has no library to sign with.
 */
static inline int rmem_signing_key(struct rmem_service *service,
				   unsigned char key[RMEM_KEY_SIZE])
{
	return rmem_call(&service->socket, "SIGNING_KEY", RMEM_SIGNING_KEY,
			 NULL, 0, key, RMEM_KEY_SIZE);
}

/* The VM. */

static inline void rmem_vm_close(struct rmem_vm *vm)
{
	rmem_close(&vm->socket.fd);
}

/*
 * Start a VM in an engine process of its own (KVM_CREATE_VM).  engine is
 * "software", "kernel" or "auto"; policy, which is measured, has the bits
 * RMEM_POLICY_DEBUG: registers and private memory are open to the owner, and
 * RMEM_POLICY_EXPLICIT: after the launch, pages become shared only when the
 * guest has asked (MAP_GPA_RANGE), and slots with a private half stay.
 *
 * -EAGAIN, -ENOMEM or -EMFILE when there can be no further process; -ENOTCONN
 * when the service is gone.  What the engine cannot do, -EINVAL for
 * an unknown one among it, is the answer to the VM's first call.
 */
static inline int rmem_vm_create(struct rmem_service *service,
				 const char *engine, uint32_t policy,
				 struct rmem_vm *vm)
{
	char body[128], number[32];
	size_t size = sizeof(number);
	int rc;

	memset(vm, 0, sizeof(*vm));
	vm->socket.fd = -1;
	snprintf(body, sizeof(body), "kvm {\"engine\": \"%s\", \"policy\": %u}",
		 engine, policy);
	rc = rmem_send(&service->socket, "SPAWN", RMEM_SPAWN, body,
		       strlen(body), NULL, 0, -1);
	return rc ? rc : rmem_reply_upto(&service->socket, number, &size,
					 &vm->socket.fd);
}

/*
 * Make a slot, delete it with memory_size 0, or move one without a private half
 * to another guest_phys_addr (KVM_SET_USER_MEMORY_REGION).
 *
 * With RMEM_MEM_PRIVATE, token is one that rmem_token gave for the restricted
 * descriptor, which the slot keeps alive; else NULL.  shared_fd is a memfd
 * with the shared half, or -1; it is sealed against shrinking.
 *
 * -EINVAL, -EEXIST as v9 and v10; -EINVAL for a token of no descriptor, and
 * for a shared_fd that is no memfd or too short; -EPERM as the policy says.
 */
static inline int
rmem_set_user_memory_region(struct rmem_vm *vm,
			    const struct rmem_userspace_memory_region_ext *region,
			    const unsigned char *token, int shared_fd)
{
	int rc = rmem_send(&vm->socket, "KVM_SET_USER_MEMORY_REGION",
			   RMEM_SET_USER_MEMORY_REGION, region, sizeof(*region),
			   token, token ? RMEM_TOKEN_SIZE : 0, shared_fd);

	return rc ? rc : rmem_reply(&vm->socket, NULL, 0, NULL);
}

/*
 * Make a range private or shared (v10: KVM_SET_MEMORY_ATTRIBUTES).  On return
 * address and size are what is left to be done, and of what is done no vCPU
 * reaches the other half any more.
 *
 * -EINVAL for an empty, unaligned or wrapping range, an unknown attribute or
 * flag; -EPERM as the policy says; -EOPNOTSUPP of a service that follows v9.
 */
static inline int
rmem_set_memory_attributes(struct rmem_vm *vm,
			   struct rmem_memory_attributes *attributes)
{
	struct rmem_memory_attributes left;
	int rc = rmem_call(&vm->socket, "KVM_SET_MEMORY_ATTRIBUTES",
			   RMEM_SET_MEMORY_ATTRIBUTES, attributes,
			   sizeof(*attributes), &left, sizeof(left));

	if (!rc)
		*attributes = left;
	return rc;
}

/*
 * Make a range private (v9: KVM_MEMORY_ENCRYPT_REG_REGION) or shared.
 *
 * -EINVAL for an empty, unaligned or wrapping range; -EPERM as the policy says;
 * -EOPNOTSUPP of a service that follows v10.
 */
static inline int rmem_memory_encrypt_reg_region(struct rmem_vm *vm,
						 const struct rmem_enc_region *region)
{
	return rmem_call(&vm->socket, "KVM_MEMORY_ENCRYPT_REG_REGION",
			 RMEM_MEMORY_ENCRYPT_REG_REGION, region,
			 sizeof(*region), NULL, 0);
}

static inline int rmem_memory_encrypt_unreg_region(struct rmem_vm *vm,
						   const struct rmem_enc_region *region)
{
	return rmem_call(&vm->socket, "KVM_MEMORY_ENCRYPT_UNREG_REGION",
			 RMEM_MEMORY_ENCRYPT_UNREG_REGION, region,
			 sizeof(*region), NULL, 0);
}

/*
 * Put initial content into private memory, whole aligned pages of it, before
 * the launch is finished (LAUNCH_UPDATE).  Pages count towards the measurement
 * in the order in which they come.
 *
 * -EINVAL for less than whole pages; -EPERM once the launch is finished;
 * -EFAULT where the range is not private memory of one slot; -ENOSPC, -ENOMEM.
 */
static inline int rmem_launch_update(struct rmem_vm *vm, uint64_t gpa,
				     const void *data, size_t size)
{
	/* As many pages as a message holds. */
	const size_t most = (RMEM_MAX_MESSAGE - RMEM_PAGE_SIZE) &
			    ~(size_t)(RMEM_PAGE_SIZE - 1);
	const unsigned char *from = (const unsigned char *)data;
	size_t part;
	int rc;

	for (; size; gpa += part, from += part, size -= part) {
		part = size < most ? size : most;
		rc = rmem_send(&vm->socket, "LAUNCH_UPDATE", RMEM_LAUNCH_UPDATE,
			       &gpa, sizeof(gpa), from, part, -1);
		if (!rc)
			rc = rmem_reply(&vm->socket, NULL, 0, NULL);
		if (rc)
			return rc;
	}
	return 0;
}

/*
 * Finish the launch and get its measurement (LAUNCH_FINISH); again gets the
 * same.  The first run does so too, if nobody did.
 */
static inline int
rmem_launch_finish(struct rmem_vm *vm,
		   unsigned char measurement[RMEM_MEASUREMENT_SIZE])
{
	return rmem_call(&vm->socket, "LAUNCH_FINISH", RMEM_LAUNCH_FINISH, NULL,
			 0, measurement, RMEM_MEASUREMENT_SIZE);
}

/*
 * Stop a vCPU: its run, which another thread waits for, or else its next one,
 * ends with RMEM_EXIT_INTR (INTERRUPT).  Returns when it is outside the guest.
 *
 * -EINVAL for a number that no vCPU has.
 */
static inline int rmem_interrupt(struct rmem_vm *vm, uint64_t number)
{
	return rmem_call(&vm->socket, "INTERRUPT", RMEM_INTERRUPT, &number,
			 sizeof(number), NULL, 0);
}

/* Ask about a KVM_CAP_* (KVM_CHECK_EXTENSION); *value is 0 for no. */
static inline int rmem_check_extension(struct rmem_vm *vm, uint64_t cap,
				       uint64_t *value)
{
	return rmem_call(&vm->socket, "KVM_CHECK_EXTENSION",
			 RMEM_CHECK_EXTENSION, &cap, sizeof(cap), value,
			 sizeof(*value));
}

/*
 * Ask which attributes pages can have (KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES).
 *
 * -EOPNOTSUPP of a service that follows v9.
 */
static inline int rmem_get_supported_memory_attributes(struct rmem_vm *vm,
						       uint64_t *attributes)
{
	return rmem_call(&vm->socket, "KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES",
			 RMEM_GET_SUPPORTED_MEMORY_ATTRIBUTES, NULL, 0,
			 attributes, sizeof(*attributes));
}

/* Write what the engine has counted into json, a string (STATISTICS). */
static inline int rmem_statistics(struct rmem_vm *vm, char *json, size_t size)
{
	int rc = rmem_send(&vm->socket, "STATISTICS", RMEM_STATISTICS, NULL, 0,
			   NULL, 0, -1);

	if (rc)
		return rc;
	size--;
	rc = rmem_reply_upto(&vm->socket, json, &size, NULL);
	json[rc ? 0 : size] = 0;
	return rc;
}

/* The vCPU. */

static inline void rmem_vcpu_close(struct rmem_vcpu *vcpu)
{
	rmem_close(&vcpu->socket.fd);
}

/*
 * Make a vCPU (KVM_CREATE_VCPU); they are numbered from 0 in the order in
 * which they are made.
 *
 * -EINVAL for one more than a VM can have; -EPERM once the launch is finished.
 */
static inline int rmem_vcpu_create(struct rmem_vm *vm, struct rmem_vcpu *vcpu)
{
	int rc;

	memset(vcpu, 0, sizeof(*vcpu));
	vcpu->socket.fd = -1;
	rc = rmem_send(&vm->socket, "KVM_CREATE_VCPU", RMEM_CREATE_VCPU, NULL, 0,
		       NULL, 0, -1);
	return rc ? rc : rmem_reply(&vm->socket, &vcpu->number,
				    sizeof(vcpu->number), &vcpu->socket.fd);
}

/*
 * Say where the guest starts (KVM_SET_REGS): rip, rsp, rdi and rsi; all else
 * is as at reset and must be 0 here.
 *
 * -EINVAL for another register; -EPERM once the launch is finished: a private
 * guest's registers are its own.
 */
static inline int rmem_set_regs(struct rmem_vcpu *vcpu,
				const struct rmem_regs *regs)
{
	return rmem_call(&vcpu->socket, "KVM_SET_REGS", RMEM_SET_REGS, regs,
			 sizeof(*regs), NULL, 0);
}

/*
 * Map a range before the guest touches it (KVM_PRE_FAULT_MEMORY).  On return
 * gpa and size are what is left to be done.
 *
 * -EINVAL for an empty, unaligned or wrapping range, or a flag; -ENOENT where
 * no slot is; -EFAULT where a page's half is missing; -EHWPOISON, -ENOMEM;
 * -EOPNOTSUPP of an engine without KVM_CAP_PRE_FAULT_MEMORY (236).
 */
static inline int rmem_pre_fault_memory(struct rmem_vcpu *vcpu,
					struct rmem_pre_fault_range *range)
{
	struct rmem_pre_fault_range left;
	int rc = rmem_call(&vcpu->socket, "KVM_PRE_FAULT_MEMORY",
			   RMEM_PRE_FAULT_MEMORY, range, sizeof(*range), &left,
			   sizeof(left));

	if (!rc)
		*range = left;
	return rc;
}

/*
 * Run the guest until it needs its owner (KVM_RUN).  value is what the last
 * exit asked for, as the comments of struct rmem_exit say; else ignored.
 */
static inline int rmem_run(struct rmem_vcpu *vcpu, uint64_t value,
			   struct rmem_exit *exit)
{
	return rmem_call(&vcpu->socket, "KVM_RUN", RMEM_RUN, &value,
			 sizeof(value), exit, sizeof(*exit));
}

#endif
