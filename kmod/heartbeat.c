// SPDX-License-Identifier: GPL-2.0
/*
 * Answers KMP heartbeats without user space, on a port of its own.
 *
 * It sits where packets arrive, below the sockets: it answers when processes hang, when the socket buffers
 * are used up and when memory is short. It knows just enough of vsock for that: no sockets, one small
 * buffer for each connection, and a few connections for each peer. Everything here runs in the peer's turns.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cpumask.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/slab.h>
#include <linux/timekeeping.h>
#include <linux/utsname.h>
#include <linux/uuid.h>

#include "kerf.h"

/* What a peer may have on its way to us, bytes: several HELLOs and heartbeats. */
#define BUFFER_BYTES	4096

static unsigned int heartbeat_port = 9001;
module_param(heartbeat_port, uint, 0444);
MODULE_PARM_DESC(heartbeat_port, "vsock port on which the kernel itself answers KMP heartbeats (default 9001)");

static char *instance = "";
module_param(instance, charp, 0444);
MODULE_PARM_DESC(instance, "name of this instance, for heartbeats; without it none is answered");

static unsigned long generation;
module_param(generation, ulong, 0444);
MODULE_PARM_DESC(generation, "generation of this instance, for heartbeats");

static char *boot_id = "";
module_param(boot_id, charp, 0444);
MODULE_PARM_DESC(boot_id, "this boot's id, as in /proc/sys/kernel/random/boot_id (default: a random one)");

static struct kerf_kmp_identity identity;

struct kerf_heartbeat {
	u32 port;		/* the peer's */
	u32 received;		/* bytes of the stream that were taken */
	u32 told;		/* of them, what the peer knows */
	u32 sent;		/* bytes of the stream that were sent */
	unsigned long used;	/* jiffies */
	struct kerf_kmp kmp;
};

int kerf_heartbeat_init(void)
{
	uuid_t uuid;

	if (strlen(instance) > KMP_INSTANCE_MAX) {
		pr_err("instance: a name has at most %d bytes\n", KMP_INSTANCE_MAX);
		return -EINVAL;
	}
	strscpy(identity.instance, instance, sizeof(identity.instance));
	strscpy(identity.release, init_utsname()->release, sizeof(identity.release));
	identity.generation = generation;
	if (*instance)
		pr_info("the kernel answers on stream port %u: no program gets what comes for it\n", heartbeat_port);
	if (!*boot_id) {
		generate_random_uuid(identity.boot_id);
		return 0;
	}
	if (uuid_parse(boot_id, &uuid)) {
		pr_err("boot_id: %s is no UUID\n", boot_id);
		return -EINVAL;
	}
	export_uuid(identity.boot_id, &uuid);
	return 0;
}

/* Whether a packet is for the kernel itself. */
bool kerf_heartbeat_wants(const struct virtio_vsock_hdr *hdr)
{
	return *identity.instance && le32_to_cpu(hdr->dst_port) == heartbeat_port &&
	       le16_to_cpu(hdr->type) == VIRTIO_VSOCK_TYPE_STREAM;
}

/* Answers @to, which came from the peer. @h is NULL when there is no connection. */
static void answer(struct kerf_peer *peer, struct kerf_heartbeat *h, const struct virtio_vsock_hdr *to,
		   u16 op, const void *data, u32 len)
{
	struct virtio_vsock_hdr *hdr;
	struct sk_buff *skb;

	/* In place of memory that is not there a heartbeat gets lost, which is what it is there to tell. */
	skb = alloc_skb(sizeof(*hdr) + len, GFP_ATOMIC | __GFP_NOWARN);
	if (!skb)
		return;
	skb_reserve(skb, VIRTIO_VSOCK_SKB_HEADROOM);
	if (len)
		skb_put_data(skb, data, len);
	hdr = virtio_vsock_hdr(skb);
	memset(hdr, 0, sizeof(*hdr));
	hdr->src_cid = to->dst_cid;
	hdr->dst_cid = to->src_cid;
	hdr->src_port = to->dst_port;
	hdr->dst_port = to->src_port;
	hdr->len = cpu_to_le32(len);
	hdr->type = cpu_to_le16(VIRTIO_VSOCK_TYPE_STREAM);
	hdr->op = cpu_to_le16(op);
	hdr->buf_alloc = cpu_to_le32(BUFFER_BYTES);
	if (h) {
		hdr->fwd_cnt = cpu_to_le32(h->received);
		h->told = h->received;
		h->sent += len;
	}
	virtio_vsock_skb_set_reply(skb);
	rcu_read_lock();
	kerf_peer_send(peer, skb);
	rcu_read_unlock();
}

static void drop(struct kerf_heartbeat **slot)
{
	kfree(*slot);
	*slot = NULL;
}

static struct kerf_heartbeat **find(struct kerf_peer *peer, u32 port)
{
	int i;

	for (i = 0; i < KERF_HEARTBEATS_MAX; i++)
		if (peer->heartbeats[i] && peer->heartbeats[i]->port == port)
			return &peer->heartbeats[i];
	return NULL;
}

/* A free place, or that of the connection which was silent for longest. */
static struct kerf_heartbeat **place(struct kerf_peer *peer)
{
	struct kerf_heartbeat **oldest = &peer->heartbeats[0];
	int i;

	for (i = 0; i < KERF_HEARTBEATS_MAX; i++) {
		struct kerf_heartbeat **slot = &peer->heartbeats[i];

		if (!*slot)
			return slot;
		if (time_before((*slot)->used, (*oldest)->used))
			oldest = slot;
	}
	return oldest;
}

static void accept(struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr)
{
	struct kerf_heartbeat **slot = find(peer, le32_to_cpu(hdr->src_port));

	if (!slot)
		slot = place(peer);
	drop(slot);
	*slot = kzalloc(sizeof(**slot), GFP_ATOMIC | __GFP_NOWARN);
	if (!*slot) {
		answer(peer, NULL, hdr, VIRTIO_VSOCK_OP_RST, NULL, 0);
		return;
	}
	(*slot)->port = le32_to_cpu(hdr->src_port);
	(*slot)->used = jiffies;
	answer(peer, *slot, hdr, VIRTIO_VSOCK_OP_RESPONSE, NULL, 0);
}

static void figures_now(struct kerf_kmp_figures *figures)
{
	struct sysinfo info;

	si_meminfo(&info);
	figures->cpus = num_online_cpus();
	figures->memory_total_kib = (u64)info.totalram * (PAGE_SIZE / 1024);
	figures->memory_available_kib = max(si_mem_available(), 0L) * (PAGE_SIZE / 1024);
	figures->boottime_ns = ktime_get_boottime_ns();
}

/* Whether the peer has room for @len bytes more, by what it says. */
static bool has_credit(const struct kerf_heartbeat *h, const struct virtio_vsock_hdr *hdr, u32 len)
{
	u32 under_way = h->sent - le32_to_cpu(hdr->fwd_cnt);

	return (u64)under_way + len <= le32_to_cpu(hdr->buf_alloc);
}

/* Feeds some bytes of the stream to the protocol; false when the connection has ended. */
static bool feed(struct kerf_peer *peer, struct kerf_heartbeat *h, const struct virtio_vsock_hdr *hdr,
		 const u8 *data, u32 len)
{
	enum kerf_kmp_result result;

	h->received += len;
	do {
		struct kerf_kmp_figures figures;

		figures_now(&figures);
		result = kerf_kmp_feed(&h->kmp, &identity, &figures, &data, &len);
		if (!h->kmp.reply_len)
			continue;
		if (!has_credit(h, hdr, h->kmp.reply_len))
			return false;
		answer(peer, h, hdr, VIRTIO_VSOCK_OP_RW, h->kmp.reply, h->kmp.reply_len);
	} while (result == KMP_REPLY);
	return result != KMP_CLOSE;
}

static bool receive_data(struct kerf_peer *peer, struct kerf_heartbeat *h, const struct virtio_vsock_hdr *hdr,
			 const struct kerf_packet *packet)
{
	u32 len = le32_to_cpu(hdr->len);
	u32 at;

	/* It was told how much we take. */
	if (len > BUFFER_BYTES)
		return false;
	for (at = 0; at < len;) {
		u8 piece[256];
		u32 now = min_t(u32, len - at, sizeof(piece));

		kerf_span_read(&packet->span, sizeof(*hdr) + at, piece, now);
		at += now;
		if (!feed(peer, h, hdr, piece, now))
			return false;
	}
	if (h->received - h->told > BUFFER_BYTES / 2)
		answer(peer, h, hdr, VIRTIO_VSOCK_OP_CREDIT_UPDATE, NULL, 0);
	return true;
}

/* Takes a packet for the kernel itself. @hdr is our own copy, its len that of the packet. */
void kerf_heartbeat_receive(struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr,
			    const struct kerf_packet *packet)
{
	u16 op = le16_to_cpu(hdr->op);
	struct kerf_heartbeat **slot;

	if (op == VIRTIO_VSOCK_OP_REQUEST) {
		accept(peer, hdr);
		return;
	}
	slot = find(peer, le32_to_cpu(hdr->src_port));
	if (op == VIRTIO_VSOCK_OP_RST) {
		if (slot)
			drop(slot);
		return;
	}
	if (slot)
		(*slot)->used = jiffies;
	if (slot && op == VIRTIO_VSOCK_OP_CREDIT_UPDATE)
		return;
	if (slot && op == VIRTIO_VSOCK_OP_CREDIT_REQUEST) {
		answer(peer, *slot, hdr, VIRTIO_VSOCK_OP_CREDIT_UPDATE, NULL, 0);
		return;
	}
	if (slot && op == VIRTIO_VSOCK_OP_RW && receive_data(peer, *slot, hdr, packet))
		return;
	/* No such connection, its end, or an error in it. */
	if (slot)
		drop(slot);
	answer(peer, NULL, hdr, VIRTIO_VSOCK_OP_RST, NULL, 0);
}

void kerf_heartbeat_reset(struct kerf_peer *peer)
{
	int i;

	for (i = 0; i < KERF_HEARTBEATS_MAX; i++)
		drop(&peer->heartbeats[i]);
}
