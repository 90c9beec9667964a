/*
 * The least that an engine can do for its owner: echo FD LENGTH
 *
 * Answers each message on the inherited socket with one of LENGTH zero bytes.
 * Ends with the connection.
 */
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>

int main(int argc, char **argv)
{
	static char asked[4096], answer[4096];
	int fd = argc == 3 ? atoi(argv[1]) : -1;
	size_t length = argc == 3 ? strtoul(argv[2], NULL, 10) : 0;

	if (fd < 0 || length > sizeof(answer)) {
		fprintf(stderr, "usage: echo FD LENGTH\n");
		return 2;
	}
	while (recv(fd, asked, sizeof(asked), 0) > 0)
		if (send(fd, answer, length, MSG_NOSIGNAL) < 0)
			return 1;
	return 0;
}
