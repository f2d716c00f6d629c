// SPDX-License-Identifier: GPL-2.0
/* One attachment to a shared memory: there is at most one in a kernel. */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/slab.h>
#include <linux/vmalloc.h>

#include "kerf.h"

static unsigned int cid_base = VMADDR_CID_HOST;
module_param(cid_base, uint, 0444);
MODULE_PARM_DESC(cid_base, "a peer's CID is its number + this (default 2: peer 0 is the host)");

/* What sockets use: read under RCU, written under kerf_device_mutex. */
struct kerf_device __rcu *kerf_the_device;
static DEFINE_MUTEX(kerf_device_mutex);

u32 kerf_cid(const struct kerf_device *dev, u32 peer)
{
	return dev->backend->local_only ? VMADDR_CID_LOCAL : cid_base + peer;
}

/* The peer that packets to @cid go to; CID 1 is this kernel itself. */
struct kerf_peer *kerf_peer_by_cid(struct kerf_device *dev, u64 cid)
{
	if (cid == VMADDR_CID_LOCAL)
		return &dev->peers[dev->me];
	if (dev->backend->local_only || cid < cid_base || cid - cid_base >= dev->region.peers)
		return NULL;
	return &dev->peers[cid - cid_base];
}

static void kerf_scan(struct work_struct *work)
{
	struct kerf_device *dev = container_of(to_delayed_work(work), struct kerf_device, scan);
	u32 i;

	kerf_restate(&dev->region, dev->me, dev->generation, dev->vectors);
	for (i = 0; i < dev->region.peers; i++)
		kerf_peer_kick(&dev->peers[i]);
	queue_delayed_work(dev->workqueue, &dev->scan, msecs_to_jiffies(KERF_SCAN_MS));
}

/*
 * Makes the way to oneself, as large as the ring of a pair. It does not lie in the shared memory: every peer
 * can write there, and no peer may end or forge what this kernel sends to itself.
 */
static int make_own_region(struct kerf_device *dev)
{
	const struct kerf_region *region = &dev->region;
	u64 size = kerf_region_size(1, region->slots, region->bytes);

	if (dev->backend->local_only) {
		dev->own = *region;
		return 0;
	}
	dev->own_memory = vzalloc(size);
	if (!dev->own_memory)
		return -ENOMEM;
	return kerf_region_format(&dev->own, dev->own_memory, size, 1, region->slots, region->bytes);
}

struct kerf_device *kerf_device_create(const struct kerf_backend *backend, void *backend_data,
				       const struct kerf_region *region, u32 me, u32 vectors)
{
	struct kerf_device *dev;
	int ret = -ENOMEM;
	u32 i;

	if (me >= region->peers) {
		pr_err("invalid peer number %u: the shared memory has room for %u peers\n", me, region->peers);
		return ERR_PTR(-ERANGE);
	}
	/* The core keeps these to itself, and CID 1 means this kernel to every kernel. */
	if (!backend->local_only && (cid_base > VMADDR_CID_ANY - KERF_PEERS_MAX || cid_base + me <= VMADDR_CID_LOCAL)) {
		pr_err("invalid cid_base %u: peer %u would have a reserved CID\n", cid_base, me);
		return ERR_PTR(-EINVAL);
	}
	dev = kvzalloc(struct_size(dev, peers, region->peers), GFP_KERNEL);
	if (!dev)
		return ERR_PTR(-ENOMEM);
	/* Unbound: each peer's work waits for its own sockets only, never for another peer's. */
	dev->workqueue = alloc_workqueue("kerf-vsock", WQ_UNBOUND | WQ_HIGHPRI | WQ_MEM_RECLAIM, 0);
	dev->calm = alloc_workqueue("kerf-vsock-calm", WQ_UNBOUND | WQ_MEM_RECLAIM, 0);
	if (!dev->workqueue || !dev->calm)
		goto free_queues;
	dev->backend = backend;
	dev->backend_data = backend_data;
	dev->region = *region;
	dev->me = me;
	dev->vectors = vectors;
	INIT_DELAYED_WORK(&dev->scan, kerf_scan);
	for (i = 0; i < region->peers; i++)
		kerf_peer_init(dev, i);
	ret = make_own_region(dev);
	if (ret)
		goto free_own;
	return dev;
free_own:
	vfree(dev->own_memory);
free_queues:
	if (dev->calm)
		destroy_workqueue(dev->calm);
	if (dev->workqueue)
		destroy_workqueue(dev->workqueue);
	kvfree(dev);
	return ERR_PTR(ret);
}

/* Begins a new incarnation. The backend may kick peers from now on, and must take doorbells already. */
int kerf_device_start(struct kerf_device *dev)
{
	int ret = 0;
	u32 i;

	mutex_lock(&kerf_device_mutex);
	if (rcu_access_pointer(kerf_the_device)) {
		pr_err("already attached to a shared memory: unbind its device first\n");
		ret = -EBUSY;
		goto out;
	}
	dev->generation = kerf_attach(&dev->region, dev->me, dev->vectors);
	if (dev->own_memory)
		kerf_attach(&dev->own, 0, 1);
	for (i = 0; i < dev->region.peers; i++)
		kerf_peer_start(&dev->peers[i]);
	rcu_assign_pointer(kerf_the_device, dev);
	ret = kerf_transport_register(dev);
	if (ret) {
		RCU_INIT_POINTER(kerf_the_device, NULL);
		synchronize_rcu();
		kerf_detach(&dev->region, dev->me, dev->generation, KERF_PEER_LEFT, NULL, 0);
		goto out;
	}
	kerf_debugfs_add(dev);
	/* Pairs with the acquire in kerf_peer_kick(), which then sees peers that have been started. */
	smp_store_release(&dev->started, true);
	/* The link of this kernel with itself needs no other peer: it is up before a socket finds the device. */
	kerf_peer_kick(&dev->peers[dev->me]);
	flush_work(&dev->peers[dev->me].urgent);
	/* The first scan looks at every peer and rings those that are there. */
	queue_delayed_work(dev->workqueue, &dev->scan, 0);
	pr_info("%s: CID %u, generation %u, %u peers\n", dev->backend->name, kerf_cid(dev, dev->me),
		dev->generation, dev->region.peers);
out:
	mutex_unlock(&kerf_device_mutex);
	return ret;
}

/* Ends the incarnation: every connection is reset. The backend does not kick peers any more. */
void kerf_device_stop(struct kerf_device *dev)
{
	u32 i;

	mutex_lock(&kerf_device_mutex);
	if (rcu_access_pointer(kerf_the_device) != dev) {
		mutex_unlock(&kerf_device_mutex);
		return;
	}
	kerf_transport_unregister(dev);
	WRITE_ONCE(dev->started, false);
	RCU_INIT_POINTER(kerf_the_device, NULL);
	synchronize_rcu();
	/* Nothing is sent now. The scan is what starts the peers' turns. */
	cancel_delayed_work_sync(&dev->scan);
	kerf_detach(&dev->region, dev->me, dev->generation, KERF_PEER_LEFT, NULL, 0);
	for (i = 0; i < dev->region.peers; i++)
		kerf_peer_stop(&dev->peers[i]);
	kerf_debugfs_remove(dev);
	mutex_unlock(&kerf_device_mutex);
}

void kerf_device_destroy(struct kerf_device *dev)
{
	destroy_workqueue(dev->calm);
	destroy_workqueue(dev->workqueue);
	vfree(dev->own_memory);
	kvfree(dev);
}
