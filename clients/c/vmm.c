/*
 * A VMM in C: runs a guest of this package on restricted memory, with
 * restrictedmem.h alone, and exits with the guest's status.
 *
 *	vmm [-s SOCKET | -p PYTHON | -x] [-e ENGINE] [-m MIB] GUEST.elf
 *	    [ARGUMENT...]
 *
 *	-s  use `restrictedmem serve --socket SOCKET`
 *	-p  start a private service with this interpreter (default
 *	    /usr/bin/python3)
 *	-x  under `restrictedmem exec`: make the descriptor by the system call,
 *	    and use the service behind it
 *	-e  the engine (default auto)
 *	-m  MiB of private memory
 *
 * The VMM makes the descriptor, gives it to the VM, loads the guest, prints the
 * measurement to stderr, and answers hypercalls (docs/use/guests.md).  It
 * cannot see the guest's private memory.
 */
#define _GNU_SOURCE		/* memfd_create, fallocate */
#include <elf.h>
#include <stdarg.h>
#include <stdbool.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "restrictedmem.h"

/* Only the numbers of the guests' header; the rest would clash with libc. */
#define __ASSEMBLER__
#include <restrictedmem/guest.h>
#undef __ASSEMBLER__

#define SYS_MEMFD_RESTRICTED	451
#define SHARED_SIZE	(1UL << 20)
#define PRIVATE_SLOT	0
#define SHARED_SLOT	1

struct boot_info {
	uint64_t magic;
	uint32_t version, argc;
	uint64_t private_base, private_size, shared_base, shared_size;
	uint64_t hypercall_page, heap_base, args, report_page, vcpus;
};

static_assert(sizeof(struct boot_info) == 88, "guest.h has another size");

struct vmm {
	struct rmem_service service;
	struct rmem_vm vm;
	struct rmem_vcpu vcpu;
	uint64_t size;			/* of private memory */
	bool by_system_call;
	int restricted_fd;
	int converted_fd;		/* its shared half */
	unsigned char *converted;	/* the shared half, mapped */
	unsigned char *window;		/* the window, shared from the start */
};

static _Noreturn void __attribute__((format(printf, 1, 2)))
die(const char *format, ...)
{
	va_list arguments;

	va_start(arguments, format);
	fputs("vmm: ", stderr);
	vfprintf(stderr, format, arguments);
	fputc('\n', stderr);
	exit(1);
}

static void must(const struct rmem_socket *socket, int rc)
{
	if (rc)
		die("%s: %s", socket->error, strerror(-rc));
}

static uint64_t whole_pages(uint64_t size)
{
	return (size + PAGE_SIZE - 1) & ~(uint64_t)(PAGE_SIZE - 1);
}

/* Make a memfd of a size, and map it. */
static unsigned char *shared_memory(uint64_t size, int *fd)
{
	void *at;

	*fd = memfd_create("vmm", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	if (*fd < 0 || ftruncate(*fd, (off_t)size))
		die("memfd: %m");
	at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
	if (at == MAP_FAILED)
		die("mmap: %m");
	return at;
}

/* Make a range of private memory shared, or private again. */
static int set_private(struct vmm *v, uint64_t gpa, uint64_t size, bool private)
{
	struct rmem_memory_attributes attributes = {
		.address = gpa,
		.size = size,
		.attributes = private ? RMEM_MEMORY_ATTRIBUTE_PRIVATE : 0,
	};
	struct rmem_enc_region region = { .addr = gpa, .size = size };
	int rc;

	if (!strcmp(v->service.api, "v9"))
		return private ? rmem_memory_encrypt_reg_region(&v->vm, &region)
			       : rmem_memory_encrypt_unreg_region(&v->vm, &region);
	/* The call may do only a part; the struct then has the rest. */
	do
		rc = rmem_set_memory_attributes(&v->vm, &attributes);
	while (!rc && attributes.size);
	return rc;
}

static void make_slots(struct vmm *v)
{
	struct rmem_userspace_memory_region_ext region = {
		.slot = PRIVATE_SLOT,
		.flags = RMEM_MEM_PRIVATE,
		.guest_phys_addr = PRIVATE_BASE,
		.memory_size = v->size,
	};
	unsigned char token[RMEM_TOKEN_SIZE];
	int window_fd;

	if (!v->by_system_call)
		must(&v->service.socket,
		     rmem_memfd_restricted(&v->service, &v->restricted_fd));
	else if ((v->restricted_fd = (int)syscall(SYS_MEMFD_RESTRICTED, 0)) < 0)
		die("memfd_restricted: %m");
	if (ftruncate(v->restricted_fd, (off_t)v->size))
		die("ftruncate: %m");
	v->converted = shared_memory(v->size, &v->converted_fd);
	must(&v->service.socket,
	     rmem_token(&v->service, v->restricted_fd, token));
	must(&v->vm.socket,
	     rmem_set_user_memory_region(&v->vm, &region, token,
					 v->converted_fd));

	region.slot = SHARED_SLOT;
	region.flags = 0;
	region.guest_phys_addr = SHARED_BASE;
	region.memory_size = SHARED_SIZE;
	v->window = shared_memory(SHARED_SIZE, &window_fd);
	must(&v->vm.socket,
	     rmem_set_user_memory_region(&v->vm, &region, NULL, window_fd));
	close(window_fd);

	must(&v->vm.socket, set_private(v, PRIVATE_BASE, v->size, true));
}

/* Map a file for reading; store its size in *size. */
static const unsigned char *open_file(const char *path, size_t *size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	struct stat found;
	void *at;

	if (fd < 0 || fstat(fd, &found))
		die("%s: %m", path);
	*size = (size_t)found.st_size;
	at = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fd, 0);
	if (at == MAP_FAILED)
		die("%s: %m", path);
	close(fd);
	return at;
}

/*
 * Lay out a guest as its memory will be, from PRIVATE_BASE on.  The caller
 * frees it.  *size becomes the size in whole pages, without zeroes at the end.
 */
static unsigned char *lay_out(struct vmm *v, const unsigned char *elf,
			      size_t elf_size, uint64_t *entry, uint64_t *end,
			      size_t *size)
{
	uint64_t most = v->size - STACK_SIZE;
	unsigned char *memory = calloc(1, most);
	Elf64_Ehdr header;
	Elf64_Phdr part;

	if (!memory || elf_size < sizeof(header))
		die("not a guest");
	memcpy(&header, elf, sizeof(header));
	if (memcmp(header.e_ident, ELFMAG, SELFMAG) ||
	    header.e_machine != EM_X86_64 || header.e_type != ET_EXEC)
		die("not a static x86-64 ELF");
	*entry = header.e_entry;
	*end = IMAGE_BASE;
	*size = BOOT_SIZE;
	for (unsigned int i = 0; i < header.e_phnum; i++) {
		uint64_t from = header.e_phoff + i * sizeof(part), to;

		if (from > elf_size - sizeof(part))
			die("ELF is cut short");
		memcpy(&part, elf + from, sizeof(part));
		if (part.p_type != PT_LOAD || !part.p_memsz)
			continue;
		to = part.p_vaddr - PRIVATE_BASE;
		if (part.p_vaddr < IMAGE_BASE || part.p_memsz > most ||
		    to > most - part.p_memsz || part.p_filesz > part.p_memsz ||
		    part.p_filesz > elf_size ||
		    part.p_offset > elf_size - part.p_filesz)
			die("the guest does not fit its memory");
		memcpy(memory + to, elf + part.p_offset, part.p_filesz);
		if (part.p_filesz && *size < to + part.p_filesz)
			*size = whole_pages(to + part.p_filesz);
		if (*end < part.p_vaddr + part.p_memsz)
			*end = whole_pages(part.p_vaddr + part.p_memsz);
	}
	return memory;
}

/* Write boot_info and, after it, the arguments; return the size in pages. */
static size_t write_boot_info(unsigned char *memory, uint64_t private_size,
			      uint64_t heap_base, char *const arguments[])
{
	struct boot_info boot = {
		.magic = BOOT_MAGIC,
		.version = BOOT_VERSION,
		.private_base = PRIVATE_BASE,
		.private_size = private_size,
		.shared_base = SHARED_BASE,
		.shared_size = SHARED_SIZE,
		.hypercall_page = HYPERCALL_PAGE,
		.heap_base = heap_base,
		.args = PRIVATE_BASE + sizeof(boot),
		.report_page = REPORT_PAGE,
		.vcpus = 1,
	};
	size_t at = sizeof(boot);

	for (; arguments[boot.argc]; boot.argc++) {
		size_t length = strlen(arguments[boot.argc]) + 1;

		if (length > BOOT_SIZE - at)
			die("arguments are too long");
		memcpy(memory + at, arguments[boot.argc], length);
		at += length;
	}
	memcpy(memory, &boot, sizeof(boot));
	return whole_pages(at);
}

static void load(struct vmm *v, const char *path, char *const arguments[])
{
	struct rmem_regs regs = {
		.rdi = PRIVATE_BASE,
		.rsp = PRIVATE_BASE + v->size,
	};
	size_t elf_size, size, boot_size;
	const unsigned char *elf = open_file(path, &elf_size);
	unsigned char *memory;
	uint64_t end;

	memory = lay_out(v, elf, elf_size, &regs.rip, &end, &size);
	boot_size = write_boot_info(memory, v->size, end, arguments);
	must(&v->vm.socket, rmem_launch_update(&v->vm, PRIVATE_BASE, memory,
					       boot_size));
	must(&v->vm.socket, rmem_launch_update(&v->vm, IMAGE_BASE,
					       memory + BOOT_SIZE,
					       size - BOOT_SIZE));
	free(memory);
	munmap((void *)(uintptr_t)elf, elf_size);
	must(&v->vcpu.socket, rmem_set_regs(&v->vcpu, &regs));
}

/* Print the measurement, which depends on the guest and its arguments. */
static void print_measurement(struct vmm *v)
{
	unsigned char measurement[RMEM_MEASUREMENT_SIZE];

	must(&v->vm.socket, rmem_launch_finish(&v->vm, measurement));
	fputs("measurement ", stderr);
	for (size_t i = 0; i < sizeof(measurement); i++)
		fprintf(stderr, "%02x", measurement[i]);
	fputc('\n', stderr);
}

/* The hypercalls: each returns the guest's result, or a negative errno. */

static int64_t transfer(struct vmm *v, int fd, uint64_t offset, uint64_t length)
{
	ssize_t n;

	if (offset > SHARED_SIZE || length > SHARED_SIZE - offset)
		return -EINVAL;
	do
		n = fd ? write(fd, v->window + offset, length)
		       : read(fd, v->window + offset, length);
	while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : n;
}

/* Say whether gpa and size are whole pages of private memory. */
static bool is_private_range(const struct vmm *v, uint64_t gpa, uint64_t size)
{
	return size && !((gpa | size) & (PAGE_SIZE - 1)) &&
	       gpa >= PRIVATE_BASE && size <= v->size &&
	       gpa - PRIVATE_BASE <= v->size - size;
}

static int punch(int fd, uint64_t offset, uint64_t size)
{
	return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
			 (off_t)offset, (off_t)size) ? -errno : 0;
}

/* Convert pages, and free those of the half that the guest sees no more. */
static int64_t map_gpa_range(struct vmm *v, uint64_t gpa, uint64_t npages,
			     uint64_t attributes)
{
	uint64_t size = npages * PAGE_SIZE, offset = gpa - PRIVATE_BASE;
	int rc;

	if (npages > v->size / PAGE_SIZE || !is_private_range(v, gpa, size))
		return -EINVAL;
	if (attributes & MAP_GPA_RANGE_ENCRYPTED) {
		rc = set_private(v, gpa, size, true);
		return rc ? rc : punch(v->converted_fd, offset, size);
	}
	rc = punch(v->restricted_fd, offset, size);
	return rc ? rc : set_private(v, gpa, size, false);
}

/* Compare the shared half of a range with old; fill it with new if equal. */
static int64_t check(struct vmm *v, uint64_t gpa, uint64_t size, uint64_t old,
		     uint64_t new)
{
	unsigned char *at = v->converted + (gpa - PRIVATE_BASE);

	if (!is_private_range(v, gpa, size))
		return -EINVAL;
	for (uint64_t i = 0; i < size; i++)
		if (at[i] != (unsigned char)old)
			return -EIO;
	memset(at, (int)new, size);
	return 0;
}

static int64_t hypercall(struct vmm *v, const struct rmem_exit_hypercall *call)
{
	const uint64_t *args = call->args;

	switch (call->nr) {
	case HYPERCALL_READ:
		return transfer(v, 0, args[0], args[1]);
	case HYPERCALL_WRITE:
		if (args[0] != STREAM_OUT && args[0] != STREAM_ERR)
			return -EINVAL;
		return transfer(v, (int)args[0], args[1], args[2]);
	case HYPERCALL_CHECK:
		return check(v, args[0], args[1], args[2], args[3]);
	case HYPERCALL_MAP_GPA_RANGE:
		return map_gpa_range(v, args[0], args[1], args[2]);
	default:
		return -ENOSYS;
	}
}

/* Run the guest to its end, and return its exit status. */
static int run(struct vmm *v)
{
	struct rmem_exit exit;
	uint64_t value = 0;

	for (;;) {
		must(&v->vcpu.socket, rmem_run(&v->vcpu, value, &exit));
		if (exit.exit_reason != RMEM_EXIT_HYPERCALL ||
		    exit.hypercall.nr == HYPERCALL_PARK)
			die("the guest stopped: exit reason %u, flags %u, "
			    "%#llx %#llx %#llx %#llx", exit.exit_reason,
			    exit.flags, (unsigned long long)exit.words[0],
			    (unsigned long long)exit.words[1],
			    (unsigned long long)exit.words[2],
			    (unsigned long long)exit.words[3]);
		if (exit.hypercall.nr == HYPERCALL_EXIT)
			return exit.hypercall.args[0] & 0xff;
		value = (uint64_t)hypercall(v, &exit.hypercall);
	}
}

int main(int argc, char *argv[])
{
	const char *server = NULL, *python = "/usr/bin/python3";
	const char *engine = "auto";
	struct vmm v = { .size = PRIVATE_SIZE_DEFAULT };
	int option, status;

	/* "+": arguments after the guest's name belong to the guest. */
	while ((option = getopt(argc, argv, "+s:p:xe:m:")) != -1) {
		switch (option) {
		case 's':
			server = optarg;
			break;
		case 'p':
			python = optarg;
			break;
		case 'x':
			server = getenv("RESTRICTEDMEM_SERVER");
			v.by_system_call = true;
			if (!server)
				die("-x works only under restrictedmem exec");
			break;
		case 'e':
			engine = optarg;
			break;
		case 'm':
			v.size = strtoull(optarg, NULL, 10) << 20;
			break;
		default:
			return 2;
		}
	}
	if (optind == argc || v.size < PRIVATE_SIZE_MIN)
		die("usage: vmm [-s SOCKET | -p PYTHON | -x] [-e ENGINE] "
		    "[-m MIB] GUEST.elf [ARGUMENT...]");

	must(&v.service.socket,
	     server ? rmem_service_connect(&v.service, server)
		    : rmem_service_start(&v.service, python, "v10"));
	must(&v.service.socket, rmem_vm_create(&v.service, engine,
					       RMEM_POLICY_EXPLICIT, &v.vm));
	make_slots(&v);
	must(&v.vm.socket, rmem_vcpu_create(&v.vm, &v.vcpu));
	load(&v, argv[optind], argv + optind + 1);
	print_measurement(&v);
	status = run(&v);

	rmem_vcpu_close(&v.vcpu);
	rmem_vm_close(&v.vm);
	close(v.restricted_fd);
	close(v.converted_fd);
	rmem_service_close(&v.service);
	munmap(v.converted, v.size);
	munmap(v.window, SHARED_SIZE);
	return status;
}
