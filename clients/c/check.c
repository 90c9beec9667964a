/*
 * Errors of restrictedmem.h: refused calls, and peers that misbehave.  For each
 * attempt this prints its name, the return value and the handle's error text,
 * separated by "|".  A test compares the lines.
 *
 *	check peer		peers made here, which answer nonsense
 *	check PYTHON ENGINE	a private service and a VM
 */
#define _GNU_SOURCE			/* memfd_create */
#include <dirent.h>
#include <pthread.h>
#include <sys/mman.h>

#include "restrictedmem.h"

#define GPA	0x40000000UL
#define SIZE	0x10000UL

static void tell(const char *what, int rc, const struct rmem_socket *socket)
{
	printf("%s|%d|%s\n", what, rc, socket->error);
}

static int open_descriptors(void)
{
	DIR *directory = opendir("/proc/self/fd");
	int count = 0;

	while (readdir(directory))
		count++;
	closedir(directory);
	return count;
}

static int memory(off_t size)
{
	int fd = memfd_create("check", MFD_CLOEXEC | MFD_ALLOW_SEALING);

	if (fd < 0 || ftruncate(fd, size))
		abort();
	return fd;
}

/* Peers that answer nonsense. */

static void connect_to(int pair[2])
{
	if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		abort();
}

/* Send a message: its first word, a body, and fd as a descriptor if >= 0. */
static void say(int socket, uint32_t number, const void *body, size_t size,
		int fd)
{
	struct rmem_socket peer = { socket, "", "" };

	if (rmem_send(&peer, "", number, body, size, NULL, 0, fd))
		abort();
}

/* Ask a peer, which has answered already, for a token: 16 bytes, no fd. */
static void ask(const char *what, uint32_t error, size_t size, int fd)
{
	static const char body[2000] = "some words";
	struct rmem_socket socket = { -1, "", "" };
	unsigned char token[RMEM_TOKEN_SIZE];
	int pair[2];

	connect_to(pair);
	socket.fd = pair[0];
	say(pair[1], error, body, size, fd);
	tell(what, rmem_call(&socket, "TOKEN", RMEM_TOKEN, NULL, 0, token,
			     sizeof(token)), &socket);
	close(pair[0]);
	close(pair[1]);
}

static void take(const char *what, uint32_t number, const char *words, int fd)
{
	struct rmem_service service;
	int pair[2], rc;

	connect_to(pair);
	say(pair[1], number, words, strlen(words), fd);
	rmem_service_init(&service, "start");
	rc = rmem_service_take(&service, pair[0]);
	tell(what, rc, &service.socket);
	close(pair[1]);
}

/* Send READY with a mount's root, and a socket of this process as witness. */
static void take_ready(const char *what, const char *json)
{
	uint32_t head[2] = { RMEM_READY, 0 };
	struct iovec pieces[2] = { { head, sizeof(head) },
				   { (void *)(uintptr_t)json, strlen(json) } };
	union {
		struct cmsghdr header;
		char space[CMSG_SPACE(2 * sizeof(int))];
	} rights;
	struct rmem_service service;
	struct msghdr message;
	int pair[2], fds[2] = { 0, -1 }, rc;

	connect_to(pair);
	fds[1] = pair[0];
	memset(&rights, 0, sizeof(rights));
	memset(&message, 0, sizeof(message));
	message.msg_iov = pieces;
	message.msg_iovlen = 2;
	message.msg_control = rights.space;
	message.msg_controllen = sizeof(rights.space);
	rights.header.cmsg_level = SOL_SOCKET;
	rights.header.cmsg_type = SCM_RIGHTS;
	rights.header.cmsg_len = CMSG_LEN(sizeof(fds));
	memcpy(CMSG_DATA(&rights.header), fds, sizeof(fds));
	if (sendmsg(pair[1], &message, 0) < 0)
		abort();
	rmem_service_init(&service, "start");
	rc = rmem_service_take(&service, pair[0]);
	tell(what, rc, &service.socket);
	close(pair[1]);
}

/* Another process listens at the name; return how many bytes it receives. */
static int stranger(const char *name, const char *json)
{
	struct sockaddr_un address;
	socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) +
				     strlen(name));
	int listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	int go[2], status;
	char byte;
	pid_t child;

	memset(&address, 0, sizeof(address));
	address.sun_family = AF_UNIX;
	strcpy(address.sun_path, name);
	address.sun_path[0] = 0;
	if (bind(listener, (struct sockaddr *)&address, size) || pipe(go))
		abort();
	fflush(stdout);
	child = fork();
	if (!child) {
		/* SO_PEERCRED names the process that called listen(). */
		if (listen(listener, 1) || write(go[1], "", 1) != 1)
			abort();
		_exit((int)recv(accept(listener, NULL, NULL), &byte, 1, 0));
	}
	if (read(go[0], &byte, 1) != 1)
		abort();
	take_ready("ready, and a stranger has its name", json);
	if (waitpid(child, &status, 0) != child)
		abort();
	close(listener);
	close(go[0]);
	close(go[1]);
	return WEXITSTATUS(status);
}

static void check_peers(void)
{
	struct rmem_vm vm = { { -1, "", "" } };
	struct rmem_vcpu vcpu;
	const struct timeval soon = { 0, 10000 };
	char small[8], name[64], json[200];
	int pair[2];

	ask("a reply", 0, 16, -1);
	ask("a descriptor nobody asked for", 0, 16, 0);
	ask("a short reply", 0, 15, -1);
	ask("a long reply", 0, 17, -1);
	ask("a reply cut off", 0, 2000, -1);
	ask("an error", EPERM, 10, -1);
	ask("an error of many words", EPERM, 1000, -1);
	ask("an error that is none", 5000, 10, -1);

	/* The call times out; a late reply must not answer the next call. */
	connect_to(pair);
	vm.socket.fd = pair[0];
	if (setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &soon, sizeof(soon)))
		abort();
	tell("a late reply", rmem_statistics(&vm, small, sizeof(small)),
	     &vm.socket);
	tell("a call after it", rmem_statistics(&vm, small, sizeof(small)),
	     &vm.socket);
	close(pair[1]);

	connect_to(pair);
	vm.socket.fd = pair[0];
	if (send(pair[1], "abc", 3, 0) != 3)
		abort();
	tell("less than a message", rmem_statistics(&vm, small, sizeof(small)),
	     &vm.socket);
	say(pair[1], 0, "{\"exits\": {}}", 13, -1);
	tell("no room for a string", rmem_statistics(&vm, small, sizeof(small)),
	     &vm.socket);
	say(pair[1], 0, NULL, 0, -1);
	tell("a descriptor missing", rmem_vcpu_create(&vm, &vcpu), &vm.socket);
	close(pair[1]);
	tell("a peer that is gone", rmem_statistics(&vm, small, sizeof(small)),
	     &vm.socket);
	rmem_vm_close(&vm);
	tell("a closed handle", rmem_statistics(&vm, small, sizeof(small)),
	     &vm.socket);

	take("not ready", EACCES, "/dev/fuse", -1);
	take("ready without its mount", RMEM_READY, "{\"api\": \"v10\"}", -1);
	take("ready without its witness", RMEM_READY, "{\"api\": \"v9\"}", 0);
	take_ready("ready without its key", "{\"socket\": \"@nobody\"}");
	take_ready("ready, and gone",
		   "{\"key\": \"00112233445566778899aabbccddeeff\", "
		   "\"socket\": \"@nobody\"}");
	snprintf(name, sizeof(name), "@restrictedmem-check-%d", (int)getpid());
	snprintf(json, sizeof(json),
		 "{\"key\": \"00112233445566778899aabbccddeeff\", "
		 "\"socket\": \"%s\"}", name);
	printf("what the stranger got|%d|\n", stranger(name, json));
}

/* A service and a VM. */

static void check_start(const char *python)
{
	struct rmem_service service;
	char name[200];

	tell("no socket", rmem_service_connect(&service, "/nonexistent/socket"),
	     &service.socket);
	memset(name, 'x', sizeof(name) - 1);
	name[sizeof(name) - 1] = 0;
	tell("a long name", rmem_service_connect(&service, name),
	     &service.socket);
	tell("no python", rmem_service_start(&service, "/nonexistent", "v10"),
	     &service.socket);
	tell("v9", rmem_service_start(&service, python, "v9"), &service.socket);
	printf("its api|0|%s\n", service.api);
	rmem_service_close(&service);
}

static void check_descriptors(struct rmem_service *service, const char *python)
{
	struct rmem_service other;
	unsigned char token[RMEM_TOKEN_SIZE];
	int null = open("/dev/null", O_RDWR | O_CLOEXEC), fd, status;
	pid_t child;

	tell("token of nothing", rmem_token(service, -1, token),
	     &service->socket);
	tell("token of another file", rmem_token(service, null, token),
	     &service->socket);
	if (rmem_service_start(&other, python, "v10") ||
	    rmem_memfd_restricted(&other, &fd))
		abort();
	tell("token of another service", rmem_token(service, fd, token),
	     &service->socket);
	close(fd);
	rmem_service_close(&other);
	close(null);

	fflush(stdout);
	child = fork();
	if (!child) {
		int rc = rmem_service_after_fork(service);

		if (!rc)
			rc = rmem_memfd_restricted(service, &fd);
		if (!rc)
			rc = rmem_token(service, fd, token);
		_exit(-rc);
	}
	if (waitpid(child, &status, 0) != child)
		abort();
	printf("a child|%d|\n", status);
}

static int set_slot(struct rmem_vm *vm, uint32_t slot, uint32_t flags,
		    uint64_t gpa, uint64_t size, const unsigned char *token,
		    int shared_fd)
{
	struct rmem_userspace_memory_region_ext region;

	memset(&region, 0, sizeof(region));
	region.slot = slot;
	region.flags = flags;
	region.guest_phys_addr = gpa;
	region.memory_size = size;
	return rmem_set_user_memory_region(vm, &region, token, shared_fd);
}

static void check_slots(struct rmem_service *service, struct rmem_vm *vm)
{
	unsigned char token[RMEM_TOKEN_SIZE], zero[RMEM_TOKEN_SIZE] = { 0 };
	int null = open("/dev/null", O_RDWR | O_CLOEXEC);
	int small = memory(SIZE / 2), shared = memory(SIZE), fd;

	if (rmem_memfd_restricted(service, &fd) || ftruncate(fd, SIZE) ||
	    rmem_token(service, fd, token))
		abort();
	tell("a token of no descriptor",
	     set_slot(vm, 0, RMEM_MEM_PRIVATE, GPA, SIZE, zero, -1), &vm->socket);
	tell("a shared half that is no memfd",
	     set_slot(vm, 1, 0, GPA, SIZE, NULL, null), &vm->socket);
	tell("a shared half too short",
	     set_slot(vm, 1, 0, GPA, SIZE, NULL, small), &vm->socket);
	tell("unaligned", set_slot(vm, 1, 0, GPA, SIZE + 1, NULL, shared),
	     &vm->socket);
	tell("a slot",
	     set_slot(vm, 0, RMEM_MEM_PRIVATE, GPA, SIZE, token, shared),
	     &vm->socket);
	tell("a token used twice",
	     set_slot(vm, 2, RMEM_MEM_PRIVATE, GPA + SIZE, SIZE, token, -1),
	     &vm->socket);
	tell("a slot over it", set_slot(vm, 1, 0, GPA, SIZE, NULL, shared),
	     &vm->socket);
	tell("no slot to delete", set_slot(vm, 7, 0, GPA, 0, NULL, -1), &vm->socket);
	close(fd);
	close(shared);
	close(small);
	close(null);
}

static void check_attributes(struct rmem_vm *vm)
{
	struct rmem_memory_attributes attributes = { GPA, SIZE, 1, 0 };
	struct rmem_enc_region region = { GPA, SIZE };

	tell("an unknown attribute",
	     rmem_set_memory_attributes(vm, &attributes), &vm->socket);
	tell("v9's call to make private",
	     rmem_memory_encrypt_reg_region(vm, &region), &vm->socket);
	tell("v9's call to make shared",
	     rmem_memory_encrypt_unreg_region(vm, &region), &vm->socket);
	attributes.attributes = RMEM_MEMORY_ATTRIBUTE_PRIVATE;
	tell("private", rmem_set_memory_attributes(vm, &attributes),
	     &vm->socket);
	printf("what is left|0|%#llx %#llx\n",
	       (unsigned long long)attributes.address,
	       (unsigned long long)attributes.size);
	tell("no such call", rmem_call(&vm->socket, "NONE", 0x1234, NULL, 0,
				       NULL, 0), &vm->socket);
}

/* A guest: the hypercall read(rdi, rsi), then an endless loop. */
static const unsigned char code[RMEM_PAGE_SIZE] = {
	0xb8, 1, 0, 0, 0,		/* mov eax, 1 */
	0xb9, 0, 0, 0x10, 0,		/* mov ecx, the hypercall page */
	0xff, 0xd1,			/* call rcx */
	0xff, 0xc8, 0xeb, 0xfc,		/* dec eax; jmp back to it */
};

static void check_launch(struct rmem_vm *vm, struct rmem_vcpu *vcpu)
{
	static unsigned char pages[40 * RMEM_PAGE_SIZE];
	unsigned char first[RMEM_MEASUREMENT_SIZE], again[sizeof(first)];
	struct rmem_vcpu late;
	struct rmem_regs regs;

	memset(&regs, 0, sizeof(regs));
	regs.rip = GPA;
	regs.rsp = GPA + 2 * RMEM_PAGE_SIZE;
	regs.rdi = 5;
	regs.rsi = 6;
	regs.rbx = 1;
	tell("another register", rmem_set_regs(vcpu, &regs), &vcpu->socket);
	regs.rbx = 0;
	tell("registers", rmem_set_regs(vcpu, &regs), &vcpu->socket);
	tell("content for nowhere",
	     rmem_launch_update(vm, 0, code, sizeof(code)), &vm->socket);
	tell("content too long for the slot",
	     rmem_launch_update(vm, GPA, pages, sizeof(pages)), &vm->socket);
	tell("content of half a page",
	     rmem_launch_update(vm, GPA, code, sizeof(code) / 2), &vm->socket);
	tell("content", rmem_launch_update(vm, GPA, code, sizeof(code)),
	     &vm->socket);

	tell("a measurement", rmem_launch_finish(vm, first), &vm->socket);
	tell("the measurement again", rmem_launch_finish(vm, again),
	     &vm->socket);
	printf("another measurement|%d|\n", !!memcmp(first, again, sizeof(first)));
	tell("late registers", rmem_set_regs(vcpu, &regs), &vcpu->socket);
	tell("late content",
	     rmem_launch_update(vm, GPA, code, sizeof(code)), &vm->socket);
	tell("a late vCPU", rmem_vcpu_create(vm, &late), &vm->socket);
}

static void *run(void *vcpu)
{
	struct rmem_exit exit;
	int rc = rmem_run((struct rmem_vcpu *)vcpu, 0, &exit);

	return (void *)(uintptr_t)(rc ? 0 : exit.exit_reason);
}

/* Stop a guest that is in its endless loop, or about to be there. */
static void check_interrupt(struct rmem_vm *vm, struct rmem_vcpu *vcpu)
{
	pthread_t thread;
	void *reason;

	tell("no vCPU to stop", rmem_interrupt(vm, 7), &vm->socket);
	if (pthread_create(&thread, NULL, run, vcpu))
		abort();
	tell("a stop", rmem_interrupt(vm, vcpu->number), &vm->socket);
	if (pthread_join(thread, &reason))
		abort();
	printf("its reason|0|%d\n", (int)(uintptr_t)reason);
}

static void check_queries(struct rmem_vm *vm, struct rmem_vcpu *vcpu)
{
	struct rmem_pre_fault_range range = { GPA, SIZE, 0, { 0 } };
	uint64_t value = 0;

	tell("an extension", rmem_check_extension(vm, 233, &value),
	     &vm->socket);
	printf("KVM_CAP_MEMORY_ATTRIBUTES|0|%llu\n", (unsigned long long)value);
	tell("another", rmem_check_extension(vm, 236, &value), &vm->socket);
	printf("KVM_CAP_PRE_FAULT_MEMORY|0|%llu\n", (unsigned long long)value);
	tell("attributes", rmem_get_supported_memory_attributes(vm, &value),
	     &vm->socket);
	printf("KVM_MEMORY_ATTRIBUTE_PRIVATE|0|%llu\n",
	       (unsigned long long)value);
	tell("a range", rmem_pre_fault_memory(vcpu, &range), &vcpu->socket);
	printf("what is left of it|0|%#llx %llu\n",
	       (unsigned long long)range.gpa, (unsigned long long)range.size);
	range.size = 1;
	tell("a range of one byte", rmem_pre_fault_memory(vcpu, &range),
	     &vcpu->socket);
}

static void check_run(struct rmem_vm *vm)
{
	struct rmem_memory_attributes attributes = { GPA, SIZE, 0, 0 };
	struct rmem_vcpu vcpu;
	struct rmem_exit exit;
	char json[8192];
	const char *pid;

	tell("a vCPU", rmem_vcpu_create(vm, &vcpu), &vm->socket);
	check_launch(vm, &vcpu);
	memset(&exit, 0xff, sizeof(exit));
	tell("a run", rmem_run(&vcpu, 0, &exit), &vcpu.socket);
	printf("its exit|0|%u %u: %llu(%llu, %llu)\n", exit.exit_reason,
	       exit.flags, (unsigned long long)exit.hypercall.nr,
	       (unsigned long long)exit.hypercall.args[0],
	       (unsigned long long)exit.hypercall.args[1]);
	check_interrupt(vm, &vcpu);
	check_queries(vm, &vcpu);

	tell("what the guest did not ask for",
	     rmem_set_memory_attributes(vm, &attributes), &vm->socket);
	tell("statistics", rmem_statistics(vm, json, sizeof(json)),
	     &vm->socket);
	pid = strstr(json, "\"pid\": ");
	if (!pid || kill(atoi(pid + strlen("\"pid\": ")), SIGKILL))
		abort();
	tell("a run without an engine", rmem_run(&vcpu, 0, &exit),
	     &vcpu.socket);
	tell("a VM without an engine", rmem_statistics(vm, json, sizeof(json)),
	     &vm->socket);
	rmem_vcpu_close(&vcpu);
}

static void check_service(const char *python, const char *engine)
{
	unsigned char key[RMEM_KEY_SIZE];
	struct rmem_service service;
	struct rmem_vm vm;

	check_start(python);
	tell("start", rmem_service_start(&service, python, "v10"),
	     &service.socket);
	check_descriptors(&service, python);
	tell("a signing key", rmem_signing_key(&service, key), &service.socket);
	tell("an engine that is none",
	     rmem_vm_create(&service, "none", 0, &vm), &service.socket);
	tell("its first call", set_slot(&vm, 0, 0, GPA, 0, NULL, -1), &vm.socket);
	rmem_vm_close(&vm);
	tell("a VM", rmem_vm_create(&service, engine, RMEM_POLICY_EXPLICIT, &vm),
	     &service.socket);
	check_slots(&service, &vm);
	check_attributes(&vm);
	check_run(&vm);
	rmem_vm_close(&vm);
	rmem_service_close(&service);
}

int main(int argc, char *argv[])
{
	int before = open_descriptors();

	if (argc == 2 && !strcmp(argv[1], "peer"))
		check_peers();
	else if (argc == 3)
		check_service(argv[1], argv[2]);
	else
		return 2;
	printf("descriptors left|%d|\n", open_descriptors() - before);
	return 0;
}
