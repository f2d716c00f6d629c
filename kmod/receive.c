// SPDX-License-Identifier: GPL-2.0
/*
 * What comes from a peer: packets are checked and taken from the ring in the peer's turns, where nothing sleeps,
 * and wait in its inbox until a work gives them to their sockets. Heartbeats are answered in the turn.
 *
 * A peer that breaks the rules of packets again and again is muted: nothing of it is taken for a while, and then it
 * is listened to again.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/bitmap.h>
#include <linux/module.h>

#include "compat.h"
#include "kerf.h"

/* Whether a packet keeps the rules: see docs/kerf-vsock.md. @hdr is our own copy. */
static bool hdr_is_valid(const struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr, u32 payload)
{
	const struct kerf_device *dev = peer->dev;
	u64 src = le64_to_cpu(hdr->src_cid), dst = le64_to_cpu(hdr->dst_cid);

	if (le32_to_cpu(hdr->len) != payload)
		return false;
	/* Just a RW packet has a payload, and it has one: the core of 6.1 queues empty messages without bound. */
	if ((payload != 0) != (le16_to_cpu(hdr->op) == VIRTIO_VSOCK_OP_RW))
		return false;
	if (src == VMADDR_CID_LOCAL || dst == VMADDR_CID_LOCAL)
		return peer->number == dev->me && src == dst;
	return src == kerf_cid(dev, peer->number) && dst == kerf_cid(dev, dev->me);
}

/* Whether to drop what asks for an answer, because the peer does not take those it has got. */
static bool must_shed(struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr)
{
	u16 op = le16_to_cpu(hdr->op);

	if (READ_ONCE(peer->replies) < KERF_REPLIES_MAX)
		return false;
	return op == VIRTIO_VSOCK_OP_REQUEST || op == VIRTIO_VSOCK_OP_CREDIT_REQUEST;
}

/* Takes note of a packet that breaks the rules. A correct peer sends none, so a few in a row are no accident. */
static void violated(struct kerf_peer *peer)
{
	peer->counters.rx_dropped++;
	if (time_after(jiffies, peer->window + msecs_to_jiffies(KERF_VIOLATIONS_MS))) {
		peer->window = jiffies;
		peer->violations = 0;
	}
	if (++peer->violations < KERF_VIOLATIONS_MAX)
		return;
	peer->violations = 0;
	/* Who has behaved for as long as it can be muted begins anew. */
	if (!peer->mute_ms || time_after(jiffies, peer->muted_until + msecs_to_jiffies(KERF_MUTE_MAX_MS)))
		peer->mute_ms = KERF_MUTE_MIN_MS;
	else
		peer->mute_ms = min_t(unsigned int, 2 * peer->mute_ms, KERF_MUTE_MAX_MS);
	peer->muted_until = jiffies + msecs_to_jiffies(peer->mute_ms);
	WRITE_ONCE(peer->muted, true);
	peer->counters.mutes++;
	pr_warn_ratelimited("peer %u breaks the rules of packets; it is not listened to for %u ms\n",
			    peer->number, peer->mute_ms);
}

/* Whether nothing is to be taken from the peer now. The scan sees to it that the end is not missed. */
static bool is_muted(struct kerf_peer *peer)
{
	if (peer->muted && time_after(jiffies, peer->muted_until))
		WRITE_ONCE(peer->muted, false);
	return peer->muted;
}

/*
 * Memory for a packet, without waiting for any, or for the sockets that take none: what is before a heartbeat must
 * not hold it up.
 */
static struct sk_buff *memory_for(struct kerf_peer *peer, u32 len)
{
	struct sk_buff *skb = peer->spare;

	if (atomic_read(&peer->inbox_bytes) > KERF_INBOX_MAX) {
		WRITE_ONCE(peer->crowded, true);
		return NULL;
	}
	if (skb && skb_tailroom(skb) >= len) {
		peer->spare = NULL;
		return skb;
	}
	skb = alloc_skb(len, GFP_NOWAIT | __GFP_NOWARN);
	if (!skb)
		WRITE_ONCE(peer->starved, len);
	return skb;
}

/* Whether a packet's bytes cost a socket more buffer than credit. */
static bool is_small(const struct virtio_vsock_hdr *hdr)
{
	return le16_to_cpu(hdr->op) == VIRTIO_VSOCK_OP_RW && le32_to_cpu(hdr->len) < KERF_SMALL_MAX;
}

/* Memory for a packet. Bytes of a stream are merged by the core, where there is room; messages keep their bounds. */
static u32 room_for(const struct virtio_vsock_hdr *hdr)
{
	if (is_small(hdr) && le16_to_cpu(hdr->type) == VIRTIO_VSOCK_TYPE_STREAM)
		return KERF_SMALL_ROOM;
	return sizeof(*hdr) + le32_to_cpu(hdr->len);
}

/* Copies a packet's header; false when the packet breaks the rules. */
static bool read_header(const struct kerf_peer *peer, const struct kerf_packet *packet, struct virtio_vsock_hdr *hdr)
{
	if (packet->len < sizeof(*hdr))
		return false;
	kerf_span_read(&packet->span, 0, hdr, sizeof(*hdr));
	return hdr_is_valid(peer, hdr, packet->len - sizeof(*hdr));
}

/*
 * Takes the heartbeats out of what cannot be taken now, and remembers their slots. Their order among each other is
 * kept, and they have no other.
 */
static void look_ahead(struct kerf_peer *peer)
{
	struct kerf_consumer ahead = peer->link.rx;
	struct virtio_vsock_hdr hdr;
	struct kerf_packet packet;

	while (kerf_consumer_peek(&ahead, &packet) == KERF_OK) {
		u32 slot = ahead.tail % ahead.slots;

		if (!test_bit(slot, peer->ahead) && read_header(peer, &packet, &hdr) && kerf_heartbeat_wants(&hdr)) {
			kerf_heartbeat_receive(peer, &hdr, &packet);
			__set_bit(slot, peer->ahead);
		}
		kerf_consumer_pass(&ahead, &packet);
	}
}

/* Takes the packet that was found. False: it cannot be taken now, and stays. */
static bool receive(struct kerf_peer *peer, const struct kerf_packet *packet)
{
	struct virtio_vsock_hdr hdr;
	struct sk_buff *skb;
	u32 payload;

	if (__test_and_clear_bit(peer->link.rx.tail % peer->link.rx.slots, peer->ahead)) {
		kerf_consumer_release(&peer->link.rx, packet);
		return true;
	}
	if (!read_header(peer, packet, &hdr))
		goto drop;
	payload = le32_to_cpu(hdr.len);
	if (must_shed(peer, &hdr)) {
		peer->counters.rx_shed++;
		kerf_consumer_release(&peer->link.rx, packet);
		return true;
	}
	if (kerf_heartbeat_wants(&hdr)) {
		kerf_heartbeat_receive(peer, &hdr, packet);
		kerf_consumer_release(&peer->link.rx, packet);
		return true;
	}
	skb = memory_for(peer, room_for(&hdr));
	if (!skb)
		return false;
	skb_reserve(skb, VIRTIO_VSOCK_SKB_HEADROOM);
	memcpy(virtio_vsock_hdr(skb), &hdr, sizeof(hdr));
	if (payload)
		kerf_span_read(&packet->span, sizeof(hdr), skb_put(skb, payload), payload);
	kerf_consumer_release(&peer->link.rx, packet);
	peer->counters.rx_packets++;
	peer->counters.rx_bytes += payload;
	peer->counters.rx_bulk += packet->bulk != 0;
	atomic_add(skb->truesize, &peer->inbox_bytes);
	skb_queue_tail(&peer->inbox, skb);
	return true;
drop:
	violated(peer);
	kerf_consumer_release(&peer->link.rx, packet);
	return true;
}

/* Waits for the memory that was not there at once. Not in a turn. */
static bool find_memory(struct kerf_peer *peer)
{
	struct sk_buff *skb;
	u32 len;

	mutex_lock(&peer->turn);
	len = peer->starved;
	WRITE_ONCE(peer->starved, 0);
	mutex_unlock(&peer->turn);
	skb = len ? alloc_skb(len, GFP_KERNEL) : NULL;
	if (!skb)
		return false;
	mutex_lock(&peer->turn);
	swap(peer->spare, skb);
	mutex_unlock(&peer->turn);
	kfree_skb(skb);
	return true;
}

/* The connected socket that a packet is for, or NULL. Ends with sock_put(). */
static struct sock *socket_of(const struct virtio_vsock_hdr *hdr)
{
	struct sockaddr_vm src, dst;

	vsock_addr_init(&src, le64_to_cpu(hdr->src_cid), le32_to_cpu(hdr->src_port));
	vsock_addr_init(&dst, le64_to_cpu(hdr->dst_cid), le32_to_cpu(hdr->dst_port));
	return vsock_find_connected_socket(&src, &dst);
}

/*
 * How many packets wait for a program in the socket that a packet is for. A socket with too many is reset: each costs
 * a buffer, for which no credit is paid. The core answers with a reset to what comes for it then.
 */
static u32 queued_packets(const struct virtio_vsock_hdr *hdr)
{
	struct sock *sk = socket_of(hdr);
	u32 queued = 0;

	if (!sk)
		return 0;
	lock_sock(sk);
	if (vsock_sk(sk)->trans && vsock_sk(sk)->transport == &kerf_transport.transport)
		queued = skb_queue_len_lockless(&((struct virtio_vsock_sock *)vsock_sk(sk)->trans)->rx_queue);
	if (queued >= KERF_QUEUED_MAX && sk->sk_state == TCP_ESTABLISHED) {
		sk->sk_state = TCP_CLOSE;
		sk->sk_err = ECONNRESET;
		sk_error_report(sk);
	}
	release_sock(sk);
	sock_put(sk);
	return queued;
}

/* The first bytes of a small packet, as a packet of their own. NULL: there is no memory. */
static struct sk_buff *split(struct sk_buff *skb)
{
	struct sk_buff *first = alloc_skb(KERF_SMALL_ROOM, GFP_KERNEL);

	if (!first)
		return NULL;
	skb_reserve(first, VIRTIO_VSOCK_SKB_HEADROOM);
	memcpy(virtio_vsock_hdr(first), virtio_vsock_hdr(skb), sizeof(struct virtio_vsock_hdr));
	skb_put_data(first, skb->data, KERF_MERGED_MAX);
	virtio_vsock_hdr(first)->len = cpu_to_le32(KERF_MERGED_MAX);
	/* The header lies before the data and is found from the head: only the data move. */
	memmove(skb->data, skb->data + KERF_MERGED_MAX, skb->len - KERF_MERGED_MAX);
	skb_trim(skb, skb->len - KERF_MERGED_MAX);
	virtio_vsock_hdr(skb)->len = cpu_to_le32(skb->len);
	return first;
}

/* Gives a packet to its socket; a small one of a stream in pieces that the core merges, where others wait there. */
static void give(struct sk_buff *skb)
{
	const struct virtio_vsock_hdr *hdr = virtio_vsock_hdr(skb);
	bool merges = le16_to_cpu(hdr->type) == VIRTIO_VSOCK_TYPE_STREAM;
	struct sk_buff *first;

	virtio_transport_deliver_tap_pkt(skb);
	if (is_small(hdr) && !(merges && skb->len <= KERF_MERGED_MAX) && queued_packets(hdr) && merges)
		while (skb->len > KERF_MERGED_MAX && (first = split(skb)))
			virtio_transport_recv_pkt(&kerf_transport, first);
	virtio_transport_recv_pkt(&kerf_transport, skb);
}

/*
 * Gives packets to their sockets, and waits for memory where there was none. Not in a turn: it waits for a socket
 * that a program holds, for as long as that program sleeps in a system call. Returns whether there is more to do.
 */
bool kerf_peer_deliver(struct kerf_peer *peer, enum kerf_worker who)
{
	int budget = KERF_DELIVERIES;
	struct sk_buff *skb;
	bool more = false;

	while (!skb_queue_empty(&peer->inbox) || READ_ONCE(peer->starved)) {
		/* Another work does it, and sees what comes until it ends. */
		if (atomic_cmpxchg(&peer->delivering, KERF_NOBODY, who) != KERF_NOBODY)
			return more;
		while (budget-- > 0 && (skb = skb_dequeue(&peer->inbox))) {
			atomic_sub(skb->truesize, &peer->inbox_bytes);
			give(skb);
		}
		if (READ_ONCE(peer->starved))
			more |= find_memory(peer);
		atomic_set(&peer->delivering, KERF_NOBODY);
		/* Pairs with the barrier in cmpxchg: either we see what came last, or who has put it there sees this. */
		smp_mb();
		if (budget < 0)
			return true;
	}
	if (READ_ONCE(peer->crowded) && atomic_read(&peer->inbox_bytes) <= KERF_INBOX_MAX) {
		WRITE_ONCE(peer->crowded, false);
		more = true;
	}
	return more;
}

void kerf_peer_forget_inbox(struct kerf_peer *peer)
{
	struct sk_buff *skb;

	while ((skb = skb_dequeue(&peer->inbox))) {
		atomic_sub(skb->truesize, &peer->inbox_bytes);
		kfree_skb(skb);
	}
	bitmap_zero(peer->ahead, KERF_SLOTS_MAX);
}

/* Takes up to a budget of packets. Returns what ended it: KERF_OK when the budget did. */
enum kerf_result kerf_peer_take(struct kerf_peer *peer)
{
	struct kerf_consumer *rx = &peer->link.rx;
	enum kerf_result result = KERF_OK;
	int budget = KERF_BUDGET_PACKETS;
	bool released = false;

	while (budget--) {
		struct kerf_packet packet;

		if (is_muted(peer)) {
			result = KERF_FULL;
			break;
		}
		result = kerf_consumer_peek(rx, &packet);
		if (result != KERF_OK)
			break;
		if (!receive(peer, &packet)) {
			look_ahead(peer);
			result = KERF_FULL;
			break;
		}
		/* It may be waiting for just these bytes. */
		if (packet.bulk && kerf_consumer_must_ring(rx))
			kerf_peer_ring(peer);
		released = !packet.bulk;
	}
	if (released && kerf_consumer_must_ring(rx))
		kerf_peer_ring(peer);
	return result;
}
