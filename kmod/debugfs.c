// SPDX-License-Identifier: GPL-2.0
/* /sys/kernel/debug/kerf-vsock/peers: one line for each peer that is or was there. */
#include <linux/debugfs.h>
#include <linux/module.h>
#include <linux/seq_file.h>

#include "kerf.h"

static struct dentry *kerf_debugfs;

static const char *link_name(const struct kerf_peer *peer)
{
	if (peer->link.up)
		return READ_ONCE(peer->muted) ? "muted" : "up";
	return READ_ONCE(peer->link.waiting) ? "waiting" : "down";
}

static const char *state_name(u32 state)
{
	static const char * const names[] = { "absent", "starting", "ready", "left", "panicked" };

	return state < ARRAY_SIZE(names) ? names[state] : "unknown";
}

static int peers_show(struct seq_file *file, void *data)
{
	struct kerf_device *dev = file->private;
	u32 i;

	seq_printf(file, "backend %s me %u cid %u generation %u peers %u slots %u bytes %u features 0x%x\n",
		   dev->backend->name, dev->me, kerf_cid(dev, dev->me), dev->generation, dev->region.peers,
		   dev->region.slots, dev->region.bytes, dev->features);
	for (i = 0; i < dev->region.peers; i++) {
		struct kerf_peer *peer = &dev->peers[i];
		const struct kerf_counters *n = &peer->counters;
		u64 word = kerf_peer_word(&dev->region, i);

		if (!word)
			continue;
		seq_printf(file, "peer %u cid %u state %s generation %u link %s backlog %u", i, kerf_cid(dev, i),
			   state_name(kerf_word_state(word)), kerf_word_generation(word),
			   link_name(peer), skb_queue_len_lockless(&peer->backlog));
		seq_printf(file, " tx_packets %llu tx_bytes %llu tx_bulk %llu tx_waited %llu",
			   n->tx_packets, n->tx_bytes, n->tx_bulk, n->tx_waited);
		seq_printf(file, " rx_packets %llu rx_bytes %llu rx_bulk %llu rx_dropped %llu rx_shed %llu",
			   n->rx_packets, n->rx_bytes, n->rx_bulk, n->rx_dropped, n->rx_shed);
		seq_printf(file, " rings %lld rung %llu lost %llu quarantined %llu mutes %llu\n",
			   (s64)atomic64_read(&n->rings), n->rung, n->lost, n->quarantined, n->mutes);
	}
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(peers);

void kerf_debugfs_init(void)
{
	kerf_debugfs = debugfs_create_dir("kerf-vsock", NULL);
}

void kerf_debugfs_exit(void)
{
	debugfs_remove(kerf_debugfs);
}

void kerf_debugfs_add(struct kerf_device *dev)
{
	dev->debugfs = debugfs_create_file("peers", 0400, kerf_debugfs, dev, &peers_fops);
}

/* Waits for readers of the file. */
void kerf_debugfs_remove(struct kerf_device *dev)
{
	debugfs_remove(dev->debugfs);
	dev->debugfs = NULL;
}
