/*
 * A VM on restricted memory, for owners written in C11 or C++11.  The header
 * speaks the protocol of docs/reference/wire-protocol.md: KVM's ioctls as
 * messages.
 *
 * The header needs only libc; there is nothing to link.  Compile as gnu11, or
 * define _GNU_SOURCE before the first include.
 *
 * Every function returns 0 or a negative errno.  After an error, the handle's
 * socket.error names the call and holds the other end's words.  From every
 * call, -ENOTCONN means that the other end is gone, and -EPROTO that its
 * answer was malformed.
 *
 * The caller keeps the descriptors that it passes in.  The caller owns and has
 * to close each descriptor or handle that a function returns; all are
 * close-on-exec.  A function that fails returns none.  Addresses, sizes and
 * offsets are bytes.  Only one thread at a time may use a handle.  Each vCPU
 * has its own handle; threads that share the VM's handle have to lock it.  No
 * signal interrupts a call.
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

/* Messages: owner to service, the service's first message, owner to engine. */
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

/* ioctl on a restricted descriptor: present a token to its service. */
#define RMEM_PROVE			0x40105201

/* Flags of a slot, a page's attribute, flags of an exit, a VM's policy. */
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
	uint32_t restricted_fd;		/* ignored: the token names the file */
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

/* struct kvm_pre_fault_memory; that name is a function here. */
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

/* A vCPU's exit.  Treat a reason that is not listed above as UNKNOWN. */
struct rmem_exit {
	uint32_t exit_reason;
	uint32_t flags;			/* IO, MMIO: 1 for an out or a write */
	union {
		uint64_t words[6];
		struct rmem_exit_io io;			/* in: next run's value */
		struct rmem_exit_hypercall hypercall;	/* rax: next run's value */
		struct rmem_exit_mmio mmio;		/* read: next run's value */
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

/* One end of a connection; error is the text of the last error. */
struct rmem_socket {
	int fd;
	const char *call;
	char error[512];
};

/* The service lives while this handle, a descriptor or a VM of it is open. */
struct rmem_service {
	struct rmem_socket socket;
	int root;			/* the root of its mount, O_PATH */
	int witness;			/* a socket with the service's SO_PEERCRED */
	char api[8];			/* "v9" or "v10" */
	char address[108];		/* its listening socket, and below the key */
	unsigned char key[RMEM_CONNECT_KEY_SIZE];
};

/* A VM lives while this handle or any of its vCPUs is open. */
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

/* Take a message's descriptors: return the first wanted ones, close the rest. */
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
 * Receive a message: its first word, at most *size bytes of body, and the
 * wanted number of descriptors, -1 for each that is missing.  *size becomes the
 * number of bytes of body.  Bytes that do not fit go to spill, which is large
 * enough for an error's text.
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
		/* The reply may still come, and must not answer a later call. */
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

/* Turn an error reply into -errno, and keep its text. */
static inline int rmem_refused(struct rmem_socket *s, uint32_t error,
			       const void *body, size_t size, const char *spill,
			       size_t spilt)
{
	char words[sizeof(s->error) - 64];	/* 64 for the call's name */

	snprintf(words, sizeof(words), "%.*s%.*s", (int)size,
		 size ? (const char *)body : "", (int)spilt, spill);
	return rmem_fail(s, error && error < 4096 ? (int)error : EPROTO, words);
}

/* Wait for a reply of at most *size bytes; *size becomes its length. */
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

/* Send a request and wait for its reply, neither with descriptors. */
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
 * Say whether a uid identifies one user.  In a user namespace, all uids that
 * are not mapped there appear as the overflow uid.
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

/* Return the inode of a pidfd, and close it; 0 without a pidfd. */
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
 * Say whether the same process made the other ends of two connections.  If its
 * uid does not identify a user here, pidfds have to tell (Linux 6.9): before,
 * all pidfds have the same inode.
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
 * Make a new connection for this process (CONNECT).  A child that inherited
 * the handle by fork has to call this: two readers of one socket would take
 * each other's replies.
 *
 * -ENOTCONN when the service is gone.
 */
static inline int rmem_service_after_fork(struct rmem_service *service)
{
	struct rmem_socket *s = &service->socket;
	int rc = 0, tries;

	/* Strangers' connections, without the key, may push this one out. */
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

/* Find a string in READY's JSON object; "" if it is missing. */
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

/* Read the key: hexadecimal digits in READY's JSON object. */
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

/* Wait for READY on a socket, and close it; then connect to the service. */
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
			       "the service did not answer");
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
 * Get a service from `restrictedmem serve --socket path`.  It runs under
 * another uid, so nobody has to trust the owner.  Or join the service of
 * `restrictedmem exec`: a path that begins with @ is an abstract name, and a
 * process of this user has to listen there.
 *
 * -ENAMETOOLONG; -ENOENT, -ECONNREFUSED, -EACCES as connect(2); -EACCES for
 * another user's name; -ETIMEDOUT after RMEM_START_SECONDS; the errno that
 * kept the service from starting.
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

	/* Move the socket above 3, where it must not be overwritten. */
	socket = fcntl(socket, F_DUPFD, 10);
	for (fd = 0; fd < 3; fd++)
		dup2(null, fd);
	dup2(socket, 3);
	syscall(SYS_close_range, 4, ~0U, 0);
	execve(python, arguments, environment);
	_exit(127);
}

/*
 * Start a private service.  It ends when this handle and every descriptor and
 * VM that it made are closed.
 *
 * python is the path of an interpreter that has the package restrictedmem.  It
 * runs with -I, so neither PYTHON* nor the current directory choose what it
 * imports.  api is the posting to follow, "v9" or "v10".  The service inherits
 * no descriptor of this process but its socket.
 *
 * -ECONNRESET when the service died without a message, for instance because
 * python or the package is missing; -ETIMEDOUT after RMEM_START_SECONDS; any
 * other errno that kept it from starting, for instance -EACCES for /dev/fuse.
 * `restrictedmem doctor` says more.
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
	/* The child has started the service, or it hangs. */
	kill(child, SIGKILL);
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
	return rc == -ENOTCONN ? -ECONNRESET : rc;
}

/*
 * Create a restricted descriptor: memfd_restricted(2).  The owner can size it
 * once with ftruncate, and allocate and punch with fallocate.  It cannot read,
 * write or map it.
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
	/* The kernel caches no name here, so unlink may find none: ENOENT. */
	if (unlinkat(service->root, name, 0) && errno != ENOENT) {
		rc = rmem_fail(&service->socket, errno, "unlinkat");
		rmem_close(fd);
		return rc;
	}
	return 0;
}

/*
 * Get a token, and present it with a restricted descriptor to the service, to
 * show that this process holds the descriptor.  The token makes one slot, once,
 * in any VM of the service.
 *
 * -EBADF; -ENOTTY for another kind of file; -EACCES for a descriptor of
 * another service.  The service keeps 64 unused tokens; a further one replaces
 * the oldest.
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
 * Get the public key (Ed25519) with which this service signs reports.
 *
 * -ENOSYS when the service has no library for signing.
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
 * "software", "kernel" or "auto".  policy is measured; its bits are:
 *
 *   RMEM_POLICY_DEBUG	the owner may access registers and private memory
 *   RMEM_POLICY_EXPLICIT after the launch, pages become shared only if the
 *			guest asked for it (MAP_GPA_RANGE), and slots with a
 *			private half cannot be changed
 *
 * -EAGAIN, -ENOMEM or -EMFILE when no further process can be made; -ENOTCONN
 * when the service is gone.  If the engine cannot run here, or does not exist
 * (-EINVAL), the VM's first call returns the error.
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
 * descriptor; the slot keeps its file alive.  Else token is NULL.  shared_fd
 * is a memfd with the shared half, or -1; the memfd is sealed against
 * shrinking.
 *
 * -EINVAL, -EEXIST as in v9 and v10; -EINVAL for a token without a descriptor,
 * and for a shared_fd that is no memfd or too short; -EPERM if the policy
 * forbids the change.
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
 * Make a range private or shared (v10: KVM_SET_MEMORY_ATTRIBUTES).  On return,
 * address and size are the part that is left to do.  In the part that is done,
 * no vCPU reaches the other half any more.
 *
 * -EINVAL for an empty, unaligned or wrapping range, an unknown attribute or
 * flag; -EPERM if the policy forbids it; -EOPNOTSUPP if the service follows v9.
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
 * -EINVAL for an empty, unaligned or wrapping range; -EPERM if the policy
 * forbids it; -EOPNOTSUPP if the service follows v10.
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
 * Write initial content, whole aligned pages, to private memory before the
 * launch is finished (LAUNCH_UPDATE).  The measurement covers the pages in the
 * order of these calls.
 *
 * -EINVAL for less than whole pages; -EPERM once the launch is finished;
 * -EFAULT where the range is not private memory of one slot; -ENOSPC, -ENOMEM.
 */
static inline int rmem_launch_update(struct rmem_vm *vm, uint64_t gpa,
				     const void *data, size_t size)
{
	/* The most whole pages that a message holds. */
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
 * Finish the launch and get its measurement (LAUNCH_FINISH).  A second call
 * returns the same measurement.  The first rmem_run finishes the launch if
 * this was not called.
 */
static inline int
rmem_launch_finish(struct rmem_vm *vm,
		   unsigned char measurement[RMEM_MEASUREMENT_SIZE])
{
	return rmem_call(&vm->socket, "LAUNCH_FINISH", RMEM_LAUNCH_FINISH, NULL,
			 0, measurement, RMEM_MEASUREMENT_SIZE);
}

/*
 * Stop a vCPU (INTERRUPT): its rmem_run in another thread, or else the next
 * one, ends with RMEM_EXIT_INTR.  Returns once the vCPU has left the guest.
 *
 * -EINVAL for a number that no vCPU has.
 */
static inline int rmem_interrupt(struct rmem_vm *vm, uint64_t number)
{
	return rmem_call(&vm->socket, "INTERRUPT", RMEM_INTERRUPT, &number,
			 sizeof(number), NULL, 0);
}

/* Ask about a KVM_CAP_* (KVM_CHECK_EXTENSION); *value is 0 if not supported. */
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
 * -EOPNOTSUPP if the service follows v9.
 */
static inline int rmem_get_supported_memory_attributes(struct rmem_vm *vm,
						       uint64_t *attributes)
{
	return rmem_call(&vm->socket, "KVM_GET_SUPPORTED_MEMORY_ATTRIBUTES",
			 RMEM_GET_SUPPORTED_MEMORY_ATTRIBUTES, NULL, 0,
			 attributes, sizeof(*attributes));
}

/* Write the engine's counters into json, as a string (STATISTICS). */
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
 * Make a vCPU (KVM_CREATE_VCPU).  vCPUs are numbered from 0 in the order of
 * creation.
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
 * Set the registers with which the guest starts (KVM_SET_REGS): rip, rsp, rdi
 * and rsi.  All others have their values at reset, and must be 0 here.
 *
 * -EINVAL for another register; -EPERM once the launch is finished: the owner
 * cannot access a private guest's registers.
 */
static inline int rmem_set_regs(struct rmem_vcpu *vcpu,
				const struct rmem_regs *regs)
{
	return rmem_call(&vcpu->socket, "KVM_SET_REGS", RMEM_SET_REGS, regs,
			 sizeof(*regs), NULL, 0);
}

/*
 * Map a range before the guest touches it (KVM_PRE_FAULT_MEMORY).  On return,
 * gpa and size are the part that is left to do.
 *
 * -EINVAL for an empty, unaligned or wrapping range, or a flag; -ENOENT where
 * there is no slot; -EFAULT where a page's half is missing; -EHWPOISON,
 * -ENOMEM; -EOPNOTSUPP if the engine lacks KVM_CAP_PRE_FAULT_MEMORY (236).
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
 * Run the guest until it exits to its owner (KVM_RUN).  value answers the last
 * exit, as the comments of struct rmem_exit say; after other exits it is
 * ignored.
 */
static inline int rmem_run(struct rmem_vcpu *vcpu, uint64_t value,
			   struct rmem_exit *exit)
{
	return rmem_call(&vcpu->socket, "KVM_RUN", RMEM_RUN, &value,
			 sizeof(value), exit, sizeof(*exit));
}

#endif
