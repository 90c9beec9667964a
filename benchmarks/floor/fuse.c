/*
 * The least that a FUSE server can do for a restricted descriptor:
 * fuse DEVICE [MEMFD]
 *
 * Speaks the kernel's protocol over /dev/fuse, inherited as descriptor DEVICE.
 * It lets files be created.  It answers FALLOCATE with 0, without doing
 * anything, or after doing it to MEMFD.  Ends with the mount.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fuse.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* A new number for each file: the kernel waits until its old node is gone. */
static uint64_t next_node = FUSE_ROOT_ID + 1;

static union {
	struct {
		struct fuse_in_header head;
		char body[];
	};
	char bytes[1 << 16];
} in;

static struct {
	struct fuse_out_header head;
	char body[512];
} out;

/* Append to the reply. */
static void *put(size_t size)
{
	void *start = (char *)&out + out.head.len;

	out.head.len += size;
	return memset(start, 0, size);
}

static void put_attr(struct fuse_attr *attr, uint64_t nodeid)
{
	attr->ino = nodeid;
	attr->mode = nodeid == FUSE_ROOT_ID ? S_IFDIR | 0700 : S_IFREG | 0777;
	attr->nlink = nodeid == FUSE_ROOT_ID ? 2 : 0;
	attr->blksize = 4096;
}

static int backing = -1;

static int do_fallocate(void)
{
	const struct fuse_fallocate_in *asked = (const void *)in.body;

	if (backing < 0)
		return 0;
	return fallocate(backing, asked->mode, asked->offset, asked->length) ? -errno : 0;
}

static int answer(void)
{
	switch (in.head.opcode) {
	case FUSE_INIT: {
		struct fuse_init_out *init = put(sizeof(*init));

		init->major = FUSE_KERNEL_VERSION;
		init->minor = 38;
		init->max_write = 4096;
		init->time_gran = 1;
		return 0;
	}
	case FUSE_CREATE: {
		struct fuse_entry_out *entry = put(sizeof(*entry));
		struct fuse_open_out *open;

		entry->nodeid = next_node++;
		put_attr(&entry->attr, entry->nodeid);
		open = put(sizeof(*open));
		open->open_flags = FOPEN_DIRECT_IO | FOPEN_NONSEEKABLE | FOPEN_STREAM | FOPEN_NOFLUSH;
		return 0;
	}
	case FUSE_GETATTR:
	case FUSE_SETATTR: {
		struct fuse_attr_out *attr = put(sizeof(*attr));

		put_attr(&attr->attr, in.head.nodeid);
		return 0;
	}
	case FUSE_FALLOCATE:
		return do_fallocate();
	case FUSE_RELEASE:
	case FUSE_UNLINK:
		return 0;
	case FUSE_LOOKUP:
		return -ENOENT;
	default:
		return -ENOSYS;
	}
}

int main(int argc, char **argv)
{
	int device = argc > 1 ? atoi(argv[1]) : -1;

	if (device < 0 || argc > 3) {
		fprintf(stderr, "usage: fuse DEVICE [MEMFD]\n");
		return 2;
	}
	if (argc == 3)
		backing = atoi(argv[2]);
	for (;;) {
		if (read(device, in.bytes, sizeof(in)) < 0) {
			if (errno == ENODEV)
				return 0;
			if (errno == ENOENT || errno == EINTR)
				continue;
			perror("read");
			return 1;
		}
		if (in.head.opcode == FUSE_FORGET || in.head.opcode == FUSE_BATCH_FORGET ||
		    in.head.opcode == FUSE_INTERRUPT)
			continue;
		out.head.unique = in.head.unique;
		out.head.len = sizeof(out.head);
		out.head.error = answer();
		if (out.head.error)
			out.head.len = sizeof(out.head);
		if (write(device, &out, out.head.len) < 0 && errno != ENOENT && errno != ENODEV) {
			perror("write");
			return 1;
		}
	}
}
