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
#include <linux/jhash.h>
#include <linux/module.h>

#include "compat.h"
#include "kerf.h"

/* Whether a packet keeps the rules: see docs/kerf-vsock.md. @hdr is our own copy. */
static bool hdr_is_valid(const struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr, u32 payload)
{
	const struct kerf_device *dev = peer->dev;
	u64 src = le64_to_cpu(hdr->src_cid), dst = le64_to_cpu(hdr->dst_cid);
	bool data = le16_to_cpu(hdr->op) == VIRTIO_VSOCK_OP_RW;

	if (le32_to_cpu(hdr->len) != payload)
		return false;
	/* Just a RW packet has a payload, and it has one: the core of 6.1 queues empty messages without bound. */
	if (data != !!payload)
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

/* Takes note of a packet that breaks the rules. A correct peer sends none, so several in a row are deliberate. */
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
	/* A peer that sent valid packets for as long as the longest mute starts with the shortest again. */
	if (!peer->mute_ms || time_after(jiffies, peer->muted_until + msecs_to_jiffies(KERF_MUTE_MAX_MS)))
		peer->mute_ms = KERF_MUTE_MIN_MS;
	else
		peer->mute_ms = min_t(unsigned int, 2 * peer->mute_ms, KERF_MUTE_MAX_MS);
	peer->muted_until = jiffies + msecs_to_jiffies(peer->mute_ms);
	WRITE_ONCE(peer->muted, true);
	peer->counters.mutes++;
	pr_warn_ratelimited("peer %u keeps sending invalid packets; ignoring it for %u ms\n",
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

/* No interrupt touches the inbox, so its lock leaves them alone. */
static void inbox_add(struct kerf_peer *peer, struct sk_buff *skb)
{
	atomic_add(skb->truesize, &peer->inbox_bytes);
	spin_lock(&peer->inbox.lock);
	__skb_queue_tail(&peer->inbox, skb);
	spin_unlock(&peer->inbox.lock);
}

static struct sk_buff *inbox_take(struct kerf_peer *peer)
{
	struct sk_buff *skb;

	spin_lock(&peer->inbox.lock);
	skb = __skb_dequeue(&peer->inbox);
	spin_unlock(&peer->inbox.lock);
	if (skb)
		atomic_sub(skb->truesize, &peer->inbox_bytes);
	return skb;
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
	skb = memory_for(peer, sizeof(hdr) + payload);
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
	inbox_add(peer, skb);
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

/* Where the passes of a connection are noted. Those of others with the same place take turns with it. */
static struct kerf_passes *passes_of(struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr)
{
	u32 hash = jhash_2words((__force u32)hdr->src_port, (__force u32)hdr->dst_port, 0);

	return &peer->passes[hash >> (32 - KERF_PASSES_BITS)];
}

/* What waits for a program in a socket. */
struct waiting {
	u32 packets;
	u32 room;	/* behind the bytes of the last packet, in its buffer */
};

/* Under the socket's lock: no program reads meanwhile, and only this work adds. */
static void look_into(struct vsock_sock *vsk, struct waiting *waiting)
{
	struct virtio_vsock_sock *vvs = vsk->trans;
	struct sk_buff *last;

	if (!vvs || vsk->transport != &kerf_transport.transport)
		return;
	spin_lock_bh(&vvs->rx_lock);
	waiting->packets = skb_queue_len(&vvs->rx_queue);
	last = skb_peek_tail(&vvs->rx_queue);
	if (last)
		waiting->room = skb_tailroom(last);
	spin_unlock_bh(&vvs->rx_lock);
}

/*
 * What waits in the socket that a packet is for. A socket with too many packets is reset: each costs a buffer, for
 * which no credit is paid. The core answers with a reset to what comes for it then.
 */
static struct waiting waiting_in(const struct virtio_vsock_hdr *hdr)
{
	struct sock *sk = socket_of(hdr);
	struct waiting waiting = {};

	if (!sk)
		return waiting;
	lock_sock(sk);
	look_into(vsock_sk(sk), &waiting);
	if (waiting.packets >= KERF_QUEUED_MAX && sk->sk_state == TCP_ESTABLISHED) {
		sk->sk_state = TCP_CLOSE;
		sk->sk_err = ECONNRESET;
		sk_error_report(sk);
	}
	release_sock(sk);
	sock_put(sk);
	return waiting;
}

/* Moves the first bytes of a packet to one of their own, which has room for @room bytes. NULL: there is no memory. */
static struct sk_buff *split(struct sk_buff *skb, u32 len, u32 room)
{
	struct sk_buff *first = alloc_skb(VIRTIO_VSOCK_SKB_HEADROOM + room, GFP_KERNEL);

	if (!first)
		return NULL;
	skb_reserve(first, VIRTIO_VSOCK_SKB_HEADROOM);
	memcpy(virtio_vsock_hdr(first), virtio_vsock_hdr(skb), sizeof(struct virtio_vsock_hdr));
	skb_put_data(first, skb->data, len);
	virtio_vsock_hdr(first)->len = cpu_to_le32(len);
	/* The header lies before the data and is found from the head: only the data move. */
	memmove(skb->data, skb->data + len, skb->len - len);
	skb_trim(skb, skb->len - len);
	virtio_vsock_hdr(skb)->len = cpu_to_le32(skb->len);
	return first;
}

/*
 * Gives a small packet of a stream, behind which others wait, in pieces that the core merges with the packet before
 * them; where that has no room the piece brings room for those that follow. Returns what is left to give, or NULL.
 */
static struct sk_buff *give_merged(struct sk_buff *skb, u32 room)
{
	while (skb->len) {
		u32 len = min_t(u32, skb->len, KERF_MERGED_MAX);
		bool fits = len < room;
		struct sk_buff *first;

		if (fits && len == skb->len)
			return skb;
		first = split(skb, len, fits ? len : KERF_SMALL_ROOM);
		if (!first)
			return skb;
		room = fits ? room - len : skb_tailroom(first);
		virtio_transport_recv_pkt(&kerf_transport, first);
	}
	consume_skb(skb);
	return NULL;
}

/*
 * Whether a small packet may go to its socket unseen. To look into the socket takes time on the way of each message,
 * and a program that reads each one before the next comes has an empty socket. Called by the work that delivers.
 */
static bool passes(struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr)
{
	struct kerf_passes *passes = passes_of(peer, hdr);

	if (passes->from != hdr->src_port || passes->to != hdr->dst_port || !passes->left)
		return false;
	passes->left--;
	return true;
}

/* Looks into the socket of a small packet. One that is empty need not be looked into for some packets. */
static struct waiting look_before_giving(struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr)
{
	struct waiting waiting = waiting_in(hdr);

	*passes_of(peer, hdr) = (struct kerf_passes){
		.from = hdr->src_port,
		.to = hdr->dst_port,
		.left = waiting.packets ? 0 : KERF_PASSES,
	};
	return waiting;
}

/* Gives a packet to its socket. */
static void give(struct kerf_peer *peer, struct sk_buff *skb)
{
	const struct virtio_vsock_hdr *hdr = virtio_vsock_hdr(skb);

	virtio_transport_deliver_tap_pkt(skb);
	if (is_small(hdr) && !passes(peer, hdr)) {
		struct waiting waiting = look_before_giving(peer, hdr);

		/* Messages keep their bounds. */
		if (waiting.packets && le16_to_cpu(hdr->type) == VIRTIO_VSOCK_TYPE_STREAM)
			skb = give_merged(skb, waiting.room);
	}
	if (skb)
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
		/* Another work does it, and sees what comes until it ends. Pairs with the release and barrier below. */
		if (atomic_cmpxchg(&peer->delivering, KERF_NOBODY, who) != KERF_NOBODY)
			return more;
		while (budget-- > 0 && (skb = inbox_take(peer)))
			give(peer, skb);
		if (READ_ONCE(peer->starved))
			more |= find_memory(peer);
		/* Pairs with atomic_cmpxchg() above: the next work that delivers sees what this one did. */
		atomic_set_release(&peer->delivering, KERF_NOBODY);
		/* Pairs with the barrier in cmpxchg: we see the last packet, or the work that queued it sees this. */
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

	while ((skb = inbox_take(peer)))
		kfree_skb(skb);
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
