// SPDX-License-Identifier: GPL-2.0
/*
 * Answers KMP heartbeats without user space, on a port of its own.
 *
 * It sits where packets arrive, below the sockets: it answers when processes hang, when the socket buffers
 * are used up and when memory is short. It knows just enough of vsock for that: no sockets, and for each peer a
 * few connections, whose memory is part of the peer. Everything here runs in the peer's turns and neither sleeps
 * nor allocates. Answers overtake what waits for the peer, and may take the slots that data leave free.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cpumask.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/moduleparam.h>
#include <linux/timekeeping.h>
#include <linux/utsname.h>
#include <linux/uuid.h>

#include "kerf.h"

/* What a peer may have on its way to us, bytes: several HELLOs and heartbeats. */
#define BUFFER_BYTES	4096

/* What is owed to a peer besides the bytes of the stream; sent in this order, the bytes between the first two. */
#define OWES_RESPONSE	BIT(0)
#define OWES_CREDIT	BIT(1)
#define OWES_RESET	BIT(2)

static unsigned int heartbeat_port = 9001;
module_param(heartbeat_port, uint, 0444);
MODULE_PARM_DESC(heartbeat_port, "vsock port on which the kernel itself answers KMP heartbeats (default 9001)");

static char *instance = "";
module_param(instance, charp, 0444);
MODULE_PARM_DESC(instance, "name of this instance, for heartbeats; without a name the kernel answers none");

static unsigned long generation;
module_param(generation, ulong, 0444);
MODULE_PARM_DESC(generation, "generation of this instance, for heartbeats");

static char *boot_id = "";
module_param(boot_id, charp, 0444);
MODULE_PARM_DESC(boot_id, "this boot's id, as in /proc/sys/kernel/random/boot_id (default: a random one)");

static struct kerf_kmp_identity identity;

int kerf_heartbeat_init(void)
{
	uuid_t uuid;

	if (strlen(instance) > KMP_INSTANCE_MAX) {
		pr_err("invalid instance: a name has at most %d bytes\n", KMP_INSTANCE_MAX);
		return -EINVAL;
	}
	strscpy(identity.instance, instance, sizeof(identity.instance));
	strscpy(identity.release, init_utsname()->release, sizeof(identity.release));
	identity.generation = generation;
	if (*instance)
		pr_info("the kernel answers heartbeats on stream port %u; programs receive nothing there\n",
			heartbeat_port);
	if (!*boot_id) {
		generate_random_uuid(identity.boot_id);
		return 0;
	}
	if (uuid_parse(boot_id, &uuid)) {
		pr_err("invalid boot_id %s: not a UUID\n", boot_id);
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

/* Sends one packet of a connection at once, before all that waits for the peer; false: its ring is full. */
static bool put(struct kerf_peer *peer, const struct kerf_heartbeat *h, u16 op, const void *data, u32 len)
{
	struct virtio_vsock_hdr hdr = {
		.src_cid = h->here,
		.dst_cid = h->there,
		.src_port = cpu_to_le32(heartbeat_port),
		.dst_port = cpu_to_le32(h->port),
		.len = cpu_to_le32(len),
		.type = cpu_to_le16(VIRTIO_VSOCK_TYPE_STREAM),
		.op = cpu_to_le16(op),
		.buf_alloc = cpu_to_le32(BUFFER_BYTES),
		.fwd_cnt = cpu_to_le32(h->received),
	};

	return kerf_peer_put(peer, &hdr, data);
}

/* Sends what is owed, in order; false when the ring has no room for all of it. */
static bool flush(struct kerf_peer *peer, struct kerf_heartbeat *h)
{
	if (h->owes & OWES_RESPONSE) {
		if (!put(peer, h, VIRTIO_VSOCK_OP_RESPONSE, NULL, 0))
			return false;
		h->owes &= ~OWES_RESPONSE;
	}
	if (h->out_len) {
		if (!put(peer, h, VIRTIO_VSOCK_OP_RW, h->out, h->out_len))
			return false;
		h->out_len = 0;
		h->told = h->received;
		h->owes &= ~OWES_CREDIT;
	}
	if (h->owes & OWES_CREDIT) {
		if (!put(peer, h, VIRTIO_VSOCK_OP_CREDIT_UPDATE, NULL, 0))
			return false;
		h->told = h->received;
		h->owes &= ~OWES_CREDIT;
	}
	if (h->owes & OWES_RESET) {
		if (!put(peer, h, VIRTIO_VSOCK_OP_RST, NULL, 0))
			return false;
		h->used = false;
	}
	return true;
}

/* Sends what the ring had no room for; false when there is still none. */
bool kerf_heartbeat_flush(struct kerf_peer *peer)
{
	bool all = true;
	int i;

	for (i = 0; i < KERF_HEARTBEATS_MAX; i++)
		if (peer->heartbeats[i].used && !flush(peer, &peer->heartbeats[i]))
			all = false;
	return all;
}

static void owe(struct kerf_peer *peer, struct kerf_heartbeat *h, u32 what)
{
	h->owes |= what;
	flush(peer, h);
}

static struct kerf_heartbeat *find(struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr)
{
	int i;

	for (i = 0; i < KERF_HEARTBEATS_MAX; i++) {
		struct kerf_heartbeat *h = &peer->heartbeats[i];

		if (h->used && h->port == le32_to_cpu(hdr->src_port) && h->there == hdr->src_cid)
			return h;
	}
	return NULL;
}

/* A free place, or that of the connection which was silent for longest. */
static struct kerf_heartbeat *place(struct kerf_peer *peer)
{
	struct kerf_heartbeat *oldest = &peer->heartbeats[0];
	int i;

	for (i = 0; i < KERF_HEARTBEATS_MAX; i++) {
		struct kerf_heartbeat *h = &peer->heartbeats[i];

		if (!h->used)
			return h;
		if (time_before(h->heard, oldest->heard))
			oldest = h;
	}
	return oldest;
}

/* A new connection, as @hdr addresses it. */
static void begin(struct kerf_heartbeat *h, const struct virtio_vsock_hdr *hdr)
{
	memset(h, 0, sizeof(*h));
	h->used = true;
	h->here = hdr->dst_cid;
	h->there = hdr->src_cid;
	h->port = le32_to_cpu(hdr->src_port);
	h->heard = jiffies;
}

static void accept(struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr)
{
	struct kerf_heartbeat *h = find(peer, hdr);

	if (!h)
		h = place(peer);
	begin(h, hdr);
	owe(peer, h, OWES_RESPONSE);
}

/* There is no such connection. A peer that takes no packet is not told. */
static void refuse(struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr)
{
	const struct kerf_heartbeat none = {
		.here = hdr->dst_cid,
		.there = hdr->src_cid,
		.port = le32_to_cpu(hdr->src_port),
	};

	put(peer, &none, VIRTIO_VSOCK_OP_RST, NULL, 0);
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
static bool feed(struct kerf_heartbeat *h, const struct virtio_vsock_hdr *hdr, const u8 *data, u32 len)
{
	enum kerf_kmp_result result;

	h->received += len;
	do {
		struct kerf_kmp_figures figures;
		u32 reply;

		figures_now(&figures);
		result = kerf_kmp_feed(&h->kmp, &identity, &figures, &data, &len);
		reply = h->kmp.reply_len;
		if (!reply)
			continue;
		/* A peer that asks on without taking its answers has more of them on their way than it may. */
		if (!has_credit(h, hdr, reply) || h->out_len + reply > sizeof(h->out))
			return false;
		memcpy(h->out + h->out_len, h->kmp.reply, reply);
		h->out_len += reply;
		h->sent += reply;
	} while (result == KMP_REPLY);
	return result != KMP_CLOSE;
}

static bool receive_data(struct kerf_heartbeat *h, const struct virtio_vsock_hdr *hdr,
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
		if (!feed(h, hdr, piece, now))
			return false;
	}
	if (h->received - h->told > BUFFER_BYTES / 2)
		h->owes |= OWES_CREDIT;
	return true;
}

/* Takes a packet for the kernel itself. @hdr is our own copy, its len that of the packet. */
void kerf_heartbeat_receive(struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr,
			    const struct kerf_packet *packet)
{
	u16 op = le16_to_cpu(hdr->op);
	struct kerf_heartbeat *h;

	if (op == VIRTIO_VSOCK_OP_REQUEST) {
		accept(peer, hdr);
		return;
	}
	h = find(peer, hdr);
	if (op == VIRTIO_VSOCK_OP_RST) {
		if (h)
			h->used = false;
		return;
	}
	if (!h) {
		refuse(peer, hdr);
		return;
	}
	h->heard = jiffies;
	/* It has ended, and only its reset still waits for room. */
	if (h->owes & OWES_RESET)
		return;
	if (op == VIRTIO_VSOCK_OP_CREDIT_UPDATE)
		return;
	if (op == VIRTIO_VSOCK_OP_CREDIT_REQUEST)
		owe(peer, h, OWES_CREDIT);
	else if (op == VIRTIO_VSOCK_OP_RW && receive_data(h, hdr, packet))
		flush(peer, h);
	else
		owe(peer, h, OWES_RESET);
}

void kerf_heartbeat_reset(struct kerf_peer *peer)
{
	int i;

	for (i = 0; i < KERF_HEARTBEATS_MAX; i++)
		peer->heartbeats[i].used = false;
}
