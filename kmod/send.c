// SPDX-License-Identifier: GPL-2.0
/*
 * What is sent to a peer.
 *
 * A packet that finds no room waits in the peer's backlog, which is bounded whatever the peer does:
 *
 *   answers        KERF_REPLIES_MAX; then what asks for them is dropped, and at twice that the answers
 *   CREDIT_UPDATE  one for each socket: a newer one takes the place of the one that waits
 *   data           KERF_BACKLOG_DATA; then sockets have no room to write
 *   REQUEST        likewise; then connect() fails
 *   all together   KERF_BACKLOG_MAX; then the link ends, and with it every connection: no packet of a
 *                  connection gets lost while the connection goes on
 *
 * The packets of a connection keep their order. Small ones of other connections may overtake bulk.
 */
#include <linux/jhash.h>
#include <linux/module.h>

#include "compat.h"
#include "kerf.h"

/* In skb->cb, behind what virtio_transport_common keeps there. */
struct kerf_skb_cb {
	struct virtio_vsock_skb_cb virtio;
	u32 sent;	/* bytes of the payload that are on their way */
	struct hlist_node credit;	/* of a CREDIT_UPDATE, in its peer's table */
};

static struct kerf_skb_cb *kerf_cb(struct sk_buff *skb)
{
	BUILD_BUG_ON(sizeof(struct kerf_skb_cb) > sizeof(skb->cb));
	return (struct kerf_skb_cb *)skb->cb;
}

/* Copies a part of @skb's payload behind the header. The header lies in the first piece of the span. */
static void copy_payload(struct sk_buff *skb, u32 from, u32 len, const struct kerf_span *span)
{
	const u32 header = sizeof(struct virtio_vsock_hdr);
	u32 first = min(len, span->len[0] - header);

	/* It cannot fail: the payload is that long. */
	skb_copy_bits(skb, from, span->at[0] + header, first);
	skb_copy_bits(skb, from + first, span->at[1], len - first);
}

/*
 * Puts a packet into the ring, in several parts when it is long. What a full ring has no room for is
 * remembered in the skb. tx_lock held.
 */
static enum kerf_result put_skb(struct kerf_peer *peer, struct sk_buff *skb)
{
	struct virtio_vsock_hdr hdr = *virtio_vsock_hdr(skb);
	const __le32 flags = hdr.flags;
	bool data = le16_to_cpu(hdr.op) == VIRTIO_VSOCK_OP_RW;
	u32 *sent = &kerf_cb(skb)->sent;

	virtio_transport_deliver_tap_pkt(skb);
	do {
		u32 part = min_t(u32, skb->len - *sent, KERF_PAYLOAD_MAX);
		u32 len = sizeof(hdr) + part;
		struct kerf_span span;
		enum kerf_result result;

		result = kerf_producer_reserve(&peer->link.tx, len, data ? KERF_DATA : KERF_CONTROL, &span);
		if (result != KERF_OK)
			return result;
		hdr.len = cpu_to_le32(part);
		hdr.flags = flags;
		if (*sent + part < skb->len)
			hdr.flags &= ~cpu_to_le32(VIRTIO_VSOCK_SEQ_EOM | VIRTIO_VSOCK_SEQ_EOR);
		kerf_span_write(&span, 0, &hdr, sizeof(hdr));
		copy_payload(skb, *sent, part, &span);
		kerf_producer_publish(&peer->link.tx, len);
		peer->published = true;
		*sent += part;
		peer->counters.tx_packets++;
		peer->counters.tx_bytes += part;
		peer->counters.tx_bulk += len > KERF_INLINE_MAX;
	} while (*sent < skb->len);
	return KERF_OK;
}

/*
 * Drops a packet that cannot be sent. A connect() fails with the reason. A connection that is there is about to be
 * reset, which says it better than an error of one of its packets.
 */
int kerf_drop(struct sk_buff *skb, int error)
{
	int len = skb->len;

	if (le16_to_cpu(virtio_vsock_hdr(skb)->op) != VIRTIO_VSOCK_OP_REQUEST)
		error = len;
	kfree_skb(skb);
	return error;
}

/*
 * Whether to ring for what was published. Only for that: the tickets of two idle ends would keep each other
 * awake otherwise. tx_lock held.
 */
static bool must_ring(struct kerf_peer *peer)
{
	if (!peer->published)
		return false;
	peer->published = false;
	return kerf_producer_must_ring(&peer->link.tx);
}

static u16 op_of(struct sk_buff *skb)
{
	return le16_to_cpu(virtio_vsock_hdr(skb)->op);
}

static u32 hash_of(const struct virtio_vsock_hdr *hdr)
{
	return jhash_2words((__force u32)hdr->src_port, (__force u32)hdr->dst_port, 0);
}

/* The place of a socket's CREDIT_UPDATE. */
static struct hlist_head *credits_of(struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr)
{
	return &peer->credits[hash_of(hdr) >> (32 - KERF_CREDITS_BITS)];
}

/* How many packets wait of the connection of a packet, and of those that share its place. */
static u32 *waiting_of(struct kerf_peer *peer, struct sk_buff *skb)
{
	return &peer->flows[hash_of(virtio_vsock_hdr(skb)) >> (32 - KERF_FLOWS_BITS)];
}

/* Puts a packet at the end of the backlog. tx_lock held, as for what follows. */
static void backlog_add(struct kerf_peer *peer, struct sk_buff *skb)
{
	__skb_queue_tail(&peer->backlog, skb);
	peer->waiting += skb->truesize;
	++*waiting_of(peer, skb);
	peer->replies += virtio_vsock_skb_reply(skb);
	if (op_of(skb) == VIRTIO_VSOCK_OP_CREDIT_UPDATE)
		hlist_add_head(&kerf_cb(skb)->credit, credits_of(peer, virtio_vsock_hdr(skb)));
}

static void backlog_take(struct kerf_peer *peer, struct sk_buff *skb)
{
	__skb_unlink(skb, &peer->backlog);
	peer->waiting -= skb->truesize;
	--*waiting_of(peer, skb);
	peer->replies -= virtio_vsock_skb_reply(skb);
	if (op_of(skb) == VIRTIO_VSOCK_OP_CREDIT_UPDATE)
		hlist_del(&kerf_cb(skb)->credit);
}

/*
 * Forgets the CREDIT_UPDATE that waits for the same connection as @skb: @skb says more, and goes to the end.
 * It cannot take the other's place: a packet between the two would state an older count after it.
 */
static void forget_older_credit(struct kerf_peer *peer, struct sk_buff *skb)
{
	const struct virtio_vsock_hdr *hdr = virtio_vsock_hdr(skb);
	struct kerf_skb_cb *cb;

	hlist_for_each_entry(cb, credits_of(peer, hdr), credit) {
		struct sk_buff *older = container_of((void *)cb, struct sk_buff, cb);
		const struct virtio_vsock_hdr *its = virtio_vsock_hdr(older);

		if (its->src_port == hdr->src_port && its->dst_port == hdr->dst_port &&
		    its->src_cid == hdr->src_cid && its->type == hdr->type) {
			backlog_take(peer, older);
			kfree_skb(older);
			return;
		}
	}
}

/*
 * Queues a packet for which there is no room; a work waits for room, or finds out what is wrong. Returns
 * whether to wake that work, or an error: the packet is still the caller's.
 */
static int wait_for_room(struct kerf_peer *peer, struct sk_buff *skb, bool corrupt)
{
	switch (op_of(skb)) {
	case VIRTIO_VSOCK_OP_REQUEST:
		if (peer->waiting >= KERF_BACKLOG_DATA)
			return -ENOBUFS;
		break;
	case VIRTIO_VSOCK_OP_CREDIT_UPDATE:
		forget_older_credit(peer, skb);
		break;
	}
	if (virtio_vsock_skb_reply(skb) && peer->replies >= 2 * KERF_REPLIES_MAX)
		return -ENOBUFS;
	if (peer->waiting + skb->truesize > KERF_BACKLOG_MAX) {
		peer->overrun = true;
		kerf_peer_kick(peer);
		return -ENOBUFS;
	}
	backlog_add(peer, skb);
	peer->counters.tx_waited++;
	return skb_queue_len(&peer->backlog) == 1 || corrupt;
}

/*
 * Whether a packet may go before those that wait: a small one, and none that waits is of its connection. A reset
 * least of all overtakes its own data: to their reader it would end the stream before they do. So many in a row
 * may, and then one that waits has its turn.
 */
static bool may_overtake(struct kerf_peer *peer, struct sk_buff *skb)
{
	if (sizeof(struct virtio_vsock_hdr) + skb->len > KERF_INLINE_MAX || *waiting_of(peer, skb))
		return false;
	return peer->overtaken++ < KERF_OVERTAKE_MAX;
}

/* Whether sockets may write to the peer. A writer that was told no is woken when it may write. */
bool kerf_peer_has_room(struct kerf_peer *peer)
{
	bool room;

	/* The common case: nothing waits. A stale answer lets a socket write one packet more, and no further. */
	if (READ_ONCE(peer->waiting) < KERF_BACKLOG_DATA)
		return true;
	spin_lock_bh(&peer->tx_lock);
	room = peer->waiting < KERF_BACKLOG_DATA;
	if (!room)
		peer->choked = true;
	spin_unlock_bh(&peer->tx_lock);
	return room;
}

/*
 * Sends a packet, or queues it behind those that wait. Takes the skb; returns the length of its payload, or
 * an error. In process context, under RCU.
 */
int kerf_peer_send(struct kerf_peer *peer, struct sk_buff *skb)
{
	enum kerf_result result = KERF_FULL;
	bool rings = false;
	int len = skb->len;
	int kick = 0;

	kerf_cb(skb)->sent = 0;
	/* The receiver refuses it. The core makes none. */
	if (!len && op_of(skb) == VIRTIO_VSOCK_OP_RW) {
		consume_skb(skb);
		return 0;
	}
	spin_lock_bh(&peer->tx_lock);
	if (!peer->link.up) {
		spin_unlock_bh(&peer->tx_lock);
		return kerf_drop(skb, -EHOSTUNREACH);
	}
	if (skb_queue_empty(&peer->backlog) || may_overtake(peer, skb))
		result = put_skb(peer, skb);
	rings = must_ring(peer);
	if (result != KERF_OK)
		kick = wait_for_room(peer, skb, result == KERF_CORRUPT);
	if (rings && peer->dev->backend->doorbell_sleeps) {
		peer->must_ring = true;
		rings = false;
		kick = kick ?: 1;
	}
	spin_unlock_bh(&peer->tx_lock);
	if (result == KERF_OK)
		kerf_consume_sent(skb);
	if (rings)
		kerf_peer_ring(peer);
	if (kick > 0)
		kerf_peer_kick_drain(peer);
	return kick < 0 ? kerf_drop(skb, kick) : len;
}

/*
 * Sends a packet before those that wait, and without memory for it: false when the ring is full. In the
 * peer's turns, which ring for it.
 */
bool kerf_peer_put(struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr, const void *payload)
{
	u32 part = le32_to_cpu(hdr->len);
	u32 len = sizeof(*hdr) + part;
	enum kerf_result result = KERF_FULL;
	struct kerf_span span;

	spin_lock_bh(&peer->tx_lock);
	if (peer->link.up)
		result = kerf_producer_reserve(&peer->link.tx, len, KERF_CONTROL, &span);
	if (result == KERF_OK) {
		kerf_span_write(&span, 0, hdr, sizeof(*hdr));
		kerf_span_write(&span, sizeof(*hdr), payload, part);
		kerf_producer_publish(&peer->link.tx, len);
		peer->published = true;
		peer->counters.tx_packets++;
		peer->counters.tx_bytes += part;
		peer->counters.tx_bulk += len > KERF_INLINE_MAX;
	}
	spin_unlock_bh(&peer->tx_lock);
	return result == KERF_OK;
}

/* Forgets what waits of a socket. */
void kerf_peer_cancel(struct kerf_peer *peer, struct vsock_sock *vsk)
{
	struct sk_buff *skb, *next;
	struct sk_buff_head done;

	__skb_queue_head_init(&done);
	spin_lock_bh(&peer->tx_lock);
	skb_queue_walk_safe(&peer->backlog, skb, next) {
		if (skb->sk != sk_vsock(vsk))
			continue;
		backlog_take(peer, skb);
		__skb_queue_tail(&done, skb);
	}
	spin_unlock_bh(&peer->tx_lock);
	__skb_queue_purge(&done);
}

static void wake_writers(struct kerf_peer *peer)
{
	kerf_transport_wake_writers(kerf_cid(peer->dev, peer->number));
	if (peer->number == peer->dev->me)
		kerf_transport_wake_writers(VMADDR_CID_LOCAL);
}

/* Asks for a doorbell when there is room. tx_lock held. */
static void want_room(struct kerf_peer *peer)
{
	kerf_producer_want_room(&peer->link.tx);
	peer->wants = true;
}

/* Sends the answers to heartbeats that wait for room, and rings for what a turn has sent. In a turn. */
void kerf_peer_flush(struct kerf_peer *peer)
{
	bool waits = !kerf_heartbeat_flush(peer);
	bool rings;

	spin_lock_bh(&peer->tx_lock);
	if (waits)
		want_room(peer);
	peer->heartbeats_wait = waits;
	spin_unlock_bh(&peer->tx_lock);
	/* Room may have come just before it was asked for. */
	if (waits)
		kerf_heartbeat_flush(peer);
	spin_lock_bh(&peer->tx_lock);
	rings = must_ring(peer);
	spin_unlock_bh(&peer->tx_lock);
	if (rings)
		kerf_peer_ring(peer);
}

/*
 * Sends what waits, as far as there is room, up to a budget: the peer could make room for ever. Not in a turn: what
 * programs of this kernel send takes no time from what comes. Returns what ended it: KERF_OK when the budget did,
 * KERF_EMPTY when nothing waits any more.
 */
enum kerf_result kerf_peer_drain(struct kerf_peer *peer)
{
	enum kerf_result result = KERF_EMPTY;
	int budget = KERF_BUDGET_PACKETS;
	struct sk_buff_head done;
	bool rings, choked;
	struct sk_buff *skb;

	__skb_queue_head_init(&done);
	spin_lock_bh(&peer->tx_lock);
	while (peer->link.up && (skb = skb_peek(&peer->backlog))) {
		if (!budget--) {
			result = KERF_OK;
			break;
		}
		result = put_skb(peer, skb);
		if (result == KERF_FULL) {
			/* It may have become free just before it was asked for. */
			want_room(peer);
			result = put_skb(peer, skb);
		}
		if (result != KERF_OK)
			break;
		backlog_take(peer, skb);
		__skb_queue_tail(&done, skb);
		peer->overtaken = 0;
		result = KERF_EMPTY;
	}
	if (result == KERF_EMPTY && peer->wants && !peer->heartbeats_wait) {
		kerf_producer_has_room(&peer->link.tx);
		peer->wants = false;
	}
	/* Here, so that it is said of this link and of no later one. */
	if (result == KERF_CORRUPT)
		WRITE_ONCE(peer->suspect, true);
	/* Wake writers only when half of it is free: each then writes more than one packet. */
	choked = peer->choked && peer->waiting <= KERF_BACKLOG_DATA / 2;
	if (choked)
		peer->choked = false;
	rings = must_ring(peer) || peer->must_ring;
	peer->must_ring = false;
	spin_unlock_bh(&peer->tx_lock);
	while ((skb = __skb_dequeue(&done)))
		kerf_consume_sent(skb);
	if (rings)
		kerf_peer_ring(peer);
	if (choked)
		wake_writers(peer);
	return result;
}

/* Forgets all that waits: the connections have ended. */
void kerf_peer_forget_waiting(struct kerf_peer *peer)
{
	struct sk_buff_head waiting;
	struct sk_buff *skb;

	__skb_queue_head_init(&waiting);
	spin_lock_bh(&peer->tx_lock);
	while ((skb = skb_peek(&peer->backlog))) {
		backlog_take(peer, skb);
		__skb_queue_tail(&waiting, skb);
	}
	peer->choked = false;
	peer->overrun = false;
	peer->suspect = false;
	peer->wants = false;
	peer->heartbeats_wait = false;
	peer->must_ring = false;
	peer->published = false;
	peer->overtaken = 0;
	spin_unlock_bh(&peer->tx_lock);
	__skb_queue_purge(&waiting);
}
