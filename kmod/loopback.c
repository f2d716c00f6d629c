// SPDX-License-Identifier: GPL-2.0
/* A kernel that talks to itself as CID 1, over rings like any other: a self-test without hardware. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/module.h>
#include <linux/vmalloc.h>

#include "kerf.h"

#define LOOPBACK_SLOTS	64
#define LOOPBACK_BYTES	(128 * 1024)

static void *loopback_memory;
static struct kerf_device *loopback_device;

/* This kernel is the only peer, and peer.c needs no doorbell for that. */
static void loopback_doorbell(struct kerf_device *dev, u32 peer)
{
}

static const struct kerf_backend loopback_backend = {
	.name = "loopback",
	.doorbell = loopback_doorbell,
	.local_only = true,
};

int kerf_loopback_init(void)
{
	u64 size = kerf_region_size(1, LOOPBACK_SLOTS, LOOPBACK_BYTES);
	struct kerf_region region;
	int ret;

	loopback_memory = vzalloc(size);
	if (!loopback_memory)
		return -ENOMEM;
	ret = kerf_region_format(&region, loopback_memory, size, 1, LOOPBACK_SLOTS, LOOPBACK_BYTES);
	if (ret)
		goto free_memory;
	loopback_device = kerf_device_create(&loopback_backend, NULL, &region, 0, 1);
	if (IS_ERR(loopback_device)) {
		ret = PTR_ERR(loopback_device);
		goto free_memory;
	}
	ret = kerf_device_start(loopback_device);
	if (ret)
		goto destroy;
	return 0;
destroy:
	kerf_device_destroy(loopback_device);
free_memory:
	vfree(loopback_memory);
	return ret;
}

void kerf_loopback_exit(void)
{
	kerf_device_stop(loopback_device);
	kerf_device_destroy(loopback_device);
	vfree(loopback_memory);
}
