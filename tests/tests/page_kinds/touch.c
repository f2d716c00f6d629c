/*
 * Touches a known amount of memory of each kind, marks each page, and stays.
 *
 * The mark is 16 bytes, "KMORPH-KIND-" and the name of the kind, repeated through the page. The mark is assembled at run
 * time, so that this program's own image does not contain it. Link statically: a guest has no libraries.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/bpf.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ipc.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGE 4096
#define HUGE (2UL << 20)

static void die(const char *what)
{
	fprintf(stderr, "touch: %s: %s\n", what, strerror(errno));
	exit(1);
}

static void mark(char *at, size_t bytes, const char *kind)
{
	char text[17];

	snprintf(text, sizeof(text), "%s-%s-%s", "KMORPH", "KIND", kind);
	for (size_t i = 0; i + 16 <= bytes; i += 16)
		memcpy(at + i, text, 16);
}

static char *map(size_t bytes, int flags, int fd)
{
	char *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, flags, fd, 0);

	if (at == MAP_FAILED)
		die("mmap");
	return at;
}

static void in_file(const char *path, size_t pages, const char *kind)
{
	int fd = open(path, O_CREAT | O_RDWR, 0600);

	if (fd < 0 || ftruncate(fd, pages * PAGE))
		die(path);
	mark(map(pages * PAGE, MAP_SHARED, fd), pages * PAGE, kind);
}

static void transparent_huge(size_t count)
{
	/* Aligned by hand: the kernel maps huge pages only at aligned addresses. */
	char *at = map((count + 1) * HUGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);

	at = (char *)(((uintptr_t)at + HUGE - 1) & ~(HUGE - 1));
	if (madvise(at, count * HUGE, MADV_HUGEPAGE))
		die("madvise");
	mark(at, count * HUGE, "thp.");
}

/* Messages of System V queues: the kernel allocates each from its slabs, of 4 KiB objects. */
static void slab(size_t count)
{
	struct { long type; char text[3584]; } message = { .type = 1 };
	int queue = -1;

	for (size_t i = 0; i < count; i++) {
		/* A queue holds at most 16 KiB. */
		if (i % 4 == 0)
			queue = msgget(IPC_PRIVATE, IPC_CREAT | 0600);
		mark(message.text, sizeof(message.text), "slab");
		if (queue < 0 || msgsnd(queue, &message, sizeof(message.text), IPC_NOWAIT))
			die("msgsnd");
		memset(message.text, 0, sizeof(message.text));
	}
}

/* Values of per-CPU BPF arrays. */
static void per_cpu(size_t count)
{
	int cpus = sysconf(_SC_NPROCESSORS_CONF);
	size_t bytes = 2 * PAGE;
	char *values = calloc(cpus, bytes);
	uint32_t key = 0;

	for (size_t i = 0; i < count; i++) {
		union bpf_attr make = {
			.map_type = BPF_MAP_TYPE_PERCPU_ARRAY, .key_size = 4,
			.value_size = bytes, .max_entries = 1,
		};
		int map = syscall(SYS_bpf, BPF_MAP_CREATE, &make, sizeof(make));
		union bpf_attr put = {
			.map_fd = map, .key = (uintptr_t)&key, .value = (uintptr_t)values,
		};

		mark(values, cpus * bytes, "pcpu");
		if (map < 0 || syscall(SYS_bpf, BPF_MAP_UPDATE_ELEM, &put, sizeof(put)))
			die("bpf");
		memset(values, 0, cpus * bytes);
	}
}

static size_t pages(char **args, int number)
{
	return strtoul(args[number], NULL, 10);
}

/* touch ANONYMOUS RAMFS SHMEM HUGETLB THP SLAB PERCPU: pages; HUGETLB, THP: huge pages; last two: allocations. */
int main(int count, char **args)
{
	if (count != 8)
		return 2;
	if (mkdir("/ramfs", 0700) || mount("ramfs", "/ramfs", "ramfs", 0, NULL))
		die("ramfs");
	mark(map(pages(args, 4) * HUGE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB, -1),
	     pages(args, 4) * HUGE, "huge");
	transparent_huge(pages(args, 5));
	/* Small pages, even if transparent huge pages are enabled for all memory. */
	char *anonymous = map(pages(args, 1) * PAGE, MAP_PRIVATE | MAP_ANONYMOUS, -1);

	if (madvise(anonymous, pages(args, 1) * PAGE, MADV_NOHUGEPAGE))
		die("madvise");
	mark(anonymous, pages(args, 1) * PAGE, "anon");
	in_file("/ramfs/file", pages(args, 2), "file");
	in_file("/tmp/file", pages(args, 3), "shm.");
	slab(pages(args, 6));
	per_cpu(pages(args, 7));
	/* Data in the standard library's buffers must not stay behind. */
	int child = fork();

	if (child < 0)
		die("fork");
	if (child > 0)
		return 0;
	/* The child owns the memory from now on: neither process wrote to it after the fork, so no page was copied. */
	for (;;)
		pause();
}
