// SPDX-License-Identifier: GPL-2.0
/*
 * Kernels side by side on one machine: a piece of physical memory that all of them can reach, named by
 * parameters, and a multikernel message as the doorbell. Peers are instances: the host is 0. Built only
 * where the kernel has CONFIG_MULTIKERNEL; no such kernel was at hand to run it.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/io.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/multikernel.h>

#include "kerf.h"

/* Of the messages for users, ours. */
#define KERF_MK_DOORBELL	(MK_MSG_USER + 0x6b)

static unsigned long mk_base;
module_param(mk_base, ulong, 0444);
MODULE_PARM_DESC(mk_base, "multikernel: physical address of the shared memory, the same in every kernel");

static unsigned long mk_size;
module_param(mk_size, ulong, 0444);
MODULE_PARM_DESC(mk_size, "multikernel: its size, bytes");

static unsigned int mk_peers = 16;
module_param(mk_peers, uint, 0444);
MODULE_PARM_DESC(mk_peers, "multikernel: peers that the host makes room for (default 16)");

#define MK_SLOTS	64
#define MK_BYTES	(256 * 1024)

static void *mk_memory;
static struct kerf_device *mk_device;

/* Takes a mutex, so it is never called under a lock or in a panic. */
static void mk_doorbell(struct kerf_device *dev, u32 peer)
{
	/* One that fails is made up for by the peer's next scan. */
	mk_send_message(peer, MK_MSG_USER, KERF_MK_DOORBELL, NULL, 0);
}

static const struct kerf_backend mk_backend = {
	.name = "multikernel",
	.doorbell = mk_doorbell,
	.doorbell_sleeps = true,
};

/* In a hard interrupt. The message does not say who sent it. */
static void mk_message(u32 type, u32 subtype, void *payload, u32 len, void *context)
{
	struct kerf_device *dev = context;
	u32 i;

	if (subtype != KERF_MK_DOORBELL)
		return;
	for (i = 0; i < dev->region.peers; i++)
		kerf_peer_kick(&dev->peers[i]);
}

static int open_region(struct kerf_region *region)
{
	int ret = kerf_region_open(region, mk_memory, mk_size);

	if (ret == -ENOENT && mk_self->id == 0) {
		memset(mk_memory, 0, mk_size);
		ret = kerf_region_format(region, mk_memory, mk_size, mk_peers, MK_SLOTS, MK_BYTES);
	}
	if (ret)
		pr_err("cannot use the memory at 0x%lx: error %d; load the module in the host first\n", mk_base, ret);
	return ret;
}

int kerf_multikernel_init(void)
{
	struct kerf_region region;
	int ret;

	if (!mk_base || !mk_size) {
		pr_err("mk_base and mk_size are missing: set them to the address and size of the shared memory\n");
		return -EINVAL;
	}
	mk_memory = memremap(mk_base, mk_size, MEMREMAP_WB);
	if (!mk_memory)
		return -ENOMEM;
	ret = open_region(&region);
	if (ret)
		goto unmap;
	mk_device = kerf_device_create(&mk_backend, NULL, &region, mk_self->id, 1);
	if (IS_ERR(mk_device)) {
		ret = PTR_ERR(mk_device);
		goto unmap;
	}
	ret = mk_register_msg_handler(MK_MSG_USER, mk_message, mk_device);
	if (ret)
		goto destroy;
	ret = kerf_device_start(mk_device);
	if (ret)
		goto unregister;
	return 0;
unregister:
	mk_unregister_msg_handler(MK_MSG_USER, mk_message);
destroy:
	kerf_device_destroy(mk_device);
unmap:
	memunmap(mk_memory);
	return ret;
}

void kerf_multikernel_exit(void)
{
	mk_unregister_msg_handler(MK_MSG_USER, mk_message);
	kerf_device_stop(mk_device);
	kerf_device_destroy(mk_device);
	memunmap(mk_memory);
}
