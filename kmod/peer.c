// SPDX-License-Identifier: GPL-2.0
/*
 * One peer: what is sent to it and what comes from it.
 *
 * Each peer has its own work, so that one that floods, stalls or lies costs its own turns only. They go before
 * programs for KERF_URGENT_US in each tick, so that a heartbeat does not wait for a program; what a peer causes
 * beyond that takes turns with programs. One that breaks the rules of packets again and again is muted: nothing
 * of it is taken for a while, and then it is listened to again.
 *
 * A packet that finds no room waits in the peer's backlog, which is bounded whatever the peer does:
 *
 *   answers        KERF_REPLIES_MAX; then what asks for them is dropped, and at twice that the answers
 *   CREDIT_UPDATE  one for each socket: a newer one takes the place of the one that waits
 *   data           KERF_BACKLOG_DATA; then sockets have no room to write
 *   REQUEST        likewise; then connect() fails
 *   all together   KERF_BACKLOG_MAX; then the link ends, and with it every connection: no packet of a
 *                  connection gets lost while the connection goes on
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

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

/* In any context; nothing happens before kerf_device_start() is done. */
void kerf_peer_kick(struct kerf_peer *peer)
{
	if (smp_load_acquire(&peer->dev->started))
		queue_work(peer->dev->workqueue, &peer->urgent);
}

/* Not under tx_lock; in process context where the backend's doorbell sleeps. */
static void ring(struct kerf_peer *peer)
{
	struct kerf_device *dev = peer->dev;

	atomic64_inc(&peer->counters.rings);
	if (peer->number == dev->me)
		kerf_peer_kick(peer);
	else
		dev->backend->doorbell(dev, peer->number);
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
 * Drops a packet that cannot go. Who wants to connect is told why. A connection that is there is about to be
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

/* The place of a socket's CREDIT_UPDATE. */
static struct hlist_head *credits_of(struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr)
{
	u32 hash = jhash_2words((__force u32)hdr->src_port, (__force u32)hdr->dst_port, 0);

	return &peer->credits[hash >> (32 - KERF_CREDITS_BITS)];
}

/* Puts a packet at the end of the backlog. tx_lock held, as for what follows. */
static void backlog_add(struct kerf_peer *peer, struct sk_buff *skb)
{
	__skb_queue_tail(&peer->backlog, skb);
	peer->waiting += skb->truesize;
	peer->replies += virtio_vsock_skb_reply(skb);
	if (op_of(skb) == VIRTIO_VSOCK_OP_CREDIT_UPDATE)
		hlist_add_head(&kerf_cb(skb)->credit, credits_of(peer, virtio_vsock_hdr(skb)));
}

static void backlog_take(struct kerf_peer *peer, struct sk_buff *skb)
{
	__skb_unlink(skb, &peer->backlog);
	peer->waiting -= skb->truesize;
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
 * Queues a packet for which there is no room; the work waits for room, or finds out what is wrong. Returns
 * whether to wake the work, or an error: the packet is still the caller's.
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

/* Whether sockets may write to the peer. Who is told that they may not is woken when they may. */
bool kerf_peer_has_room(struct kerf_peer *peer)
{
	bool room;

	/* The common case: nothing waits. Who has just seen less than there is writes once more, no more. */
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
	/* Nothing overtakes, a reset least: to a reader it would end the stream before its data do. */
	if (skb_queue_empty(&peer->backlog))
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
		ring(peer);
	if (kick > 0)
		kerf_peer_kick(peer);
	return kick < 0 ? kerf_drop(skb, kick) : len;
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

/*
 * Sends what waits, as far as there is room, up to a budget: the peer could make room for ever. Returns what
 * ended it: KERF_OK when the budget did, KERF_EMPTY when nothing waits any more.
 */
static enum kerf_result drain_backlog(struct kerf_peer *peer)
{
	enum kerf_result result = KERF_EMPTY;
	int budget = KERF_BUDGET_PACKETS;
	struct sk_buff_head done;
	bool rings, choked;
	struct sk_buff *skb;

	__skb_queue_head_init(&done);
	spin_lock_bh(&peer->tx_lock);
	kerf_producer_has_room(&peer->link.tx);
	while ((skb = skb_peek(&peer->backlog))) {
		if (!budget--) {
			result = KERF_OK;
			break;
		}
		result = put_skb(peer, skb);
		if (result == KERF_FULL) {
			/* It may have become free just before it was asked for. */
			kerf_producer_want_room(&peer->link.tx);
			result = put_skb(peer, skb);
		}
		if (result != KERF_OK)
			break;
		backlog_take(peer, skb);
		__skb_queue_tail(&done, skb);
		result = KERF_EMPTY;
	}
	/* Half of it at once: who is woken has something to do. */
	choked = peer->choked && peer->waiting <= KERF_BACKLOG_DATA / 2;
	if (choked)
		peer->choked = false;
	rings = must_ring(peer) || peer->must_ring;
	peer->must_ring = false;
	spin_unlock_bh(&peer->tx_lock);
	while ((skb = __skb_dequeue(&done)))
		kerf_consume_sent(skb);
	if (rings)
		ring(peer);
	if (choked)
		wake_writers(peer);
	return result;
}

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

/* Takes the packet that was found. False: there is no memory for it now, and it stays. */
static bool receive(struct kerf_peer *peer, const struct kerf_packet *packet)
{
	struct virtio_vsock_hdr hdr;
	struct sk_buff *skb;
	u32 payload;

	if (packet->len < sizeof(hdr))
		goto drop;
	kerf_span_read(&packet->span, 0, &hdr, sizeof(hdr));
	payload = packet->len - sizeof(hdr);
	if (!hdr_is_valid(peer, &hdr, payload))
		goto drop;
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
	skb = alloc_skb(sizeof(hdr) + payload, GFP_KERNEL);
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
	virtio_transport_deliver_tap_pkt(skb);
	virtio_transport_recv_pkt(&kerf_transport, skb);
	return true;
drop:
	violated(peer);
	kerf_consumer_release(&peer->link.rx, packet);
	return true;
}

/* Connections have ended: sockets, heartbeats and what waited. */
static void reset_connections(struct kerf_peer *peer)
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
	peer->must_ring = false;
	peer->published = false;
	spin_unlock_bh(&peer->tx_lock);
	__skb_queue_purge(&waiting);
	kerf_heartbeat_reset(peer);
	kerf_transport_reset_peer(kerf_cid(peer->dev, peer->number));
	if (peer->number == peer->dev->me)
		kerf_transport_reset_peer(VMADDR_CID_LOCAL);
}

static void quarantine(struct kerf_peer *peer, const char *what)
{
	bool refused, tell;

	spin_lock_bh(&peer->tx_lock);
	refused = kerf_link_corrupt(&peer->link);
	tell = peer->link.tell;
	peer->link.tell = false;
	spin_unlock_bh(&peer->tx_lock);
	peer->counters.lost++;
	if (refused) {
		peer->counters.quarantined++;
		pr_warn_ratelimited("peer %u %s; it is ignored until it begins anew\n", peer->number, what);
	}
	reset_connections(peer);
	if (tell)
		ring(peer);
}

/* Looks at the peer; returns whether the link is up. */
static bool look(struct kerf_peer *peer)
{
	enum kerf_link_event event;
	bool tell;

	spin_lock_bh(&peer->tx_lock);
	event = kerf_link_poll(&peer->link);
	tell = peer->link.tell;
	peer->link.tell = false;
	spin_unlock_bh(&peer->tx_lock);
	if (tell)
		ring(peer);
	if (event == KERF_LINK_CAME_UP) {
		peer->asleep = false;
		/* It may be another kernel. If it is not, it is muted for longer the next time. */
		WRITE_ONCE(peer->muted, false);
	}
	if (event == KERF_LINK_LOST) {
		peer->counters.lost++;
		reset_connections(peer);
		/* It may be there anew already. */
		kerf_peer_kick(peer);
	}
	return event == KERF_LINK_UP || event == KERF_LINK_CAME_UP;
}

/* Takes up to a budget of packets. Returns what ended it: KERF_OK when the budget did. */
static enum kerf_result take_packets(struct kerf_peer *peer)
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
			/* No memory: the next scan tries again. */
			result = KERF_FULL;
			break;
		}
		/* It may be waiting for just these bytes. */
		if (packet.bulk && kerf_consumer_must_ring(rx))
			ring(peer);
		released = !packet.bulk;
	}
	if (released && kerf_consumer_must_ring(rx))
		ring(peer);
	return result;
}

/* One turn: looks, takes, sends. Returns whether there is more to do at once. */
static bool take_turn(struct kerf_peer *peer)
{
	struct kerf_consumer *rx = &peer->link.rx;
	enum kerf_result result, drained;
	struct kerf_packet packet;

	peer->counters.rung++;
	if (!look(peer))
		return false;
	if (peer->asleep) {
		kerf_consumer_awake(rx);
		peer->asleep = false;
	}
	result = take_packets(peer);
	drained = result == KERF_CORRUPT ? result : drain_backlog(peer);
	if (drained == KERF_CORRUPT) {
		quarantine(peer, "wrote what it must not");
		return false;
	}
	if (READ_ONCE(peer->overrun)) {
		quarantine(peer, "takes nothing");
		return false;
	}
	if (result == KERF_OK || drained == KERF_OK)
		return true;
	/* Muted, or no memory: the next scan tries again. */
	if (result == KERF_FULL)
		return false;
	kerf_consumer_sleep(rx);
	peer->asleep = true;
	return kerf_consumer_peek(rx, &packet) != KERF_EMPTY;
}

static void calm_work(struct work_struct *work)
{
	struct kerf_peer *peer = container_of(work, struct kerf_peer, calm);
	bool more;

	mutex_lock(&peer->turn);
	more = take_turn(peer);
	mutex_unlock(&peer->turn);
	if (more && smp_load_acquire(&peer->dev->started))
		queue_work(peer->dev->calm, &peer->calm);
}

static void urgent_work(struct work_struct *work)
{
	struct kerf_peer *peer = container_of(work, struct kerf_peer, urgent);
	bool more;
	u64 start;

	if (time_after(jiffies, peer->tick + msecs_to_jiffies(KERF_TICK_MS))) {
		peer->tick = jiffies;
		peer->tick_ns = 0;
	}
	if (peer->tick_ns > KERF_URGENT_US * NSEC_PER_USEC) {
		queue_work(peer->dev->calm, &peer->calm);
		return;
	}
	mutex_lock(&peer->turn);
	start = ktime_get_ns();
	more = take_turn(peer);
	peer->tick_ns += ktime_get_ns() - start;
	mutex_unlock(&peer->turn);
	if (more)
		kerf_peer_kick(peer);
}

void kerf_peer_init(struct kerf_device *dev, u32 number)
{
	struct kerf_peer *peer = &dev->peers[number];

	peer->dev = dev;
	peer->number = number;
	mutex_init(&peer->turn);
	peer->tick = jiffies;
	peer->window = jiffies;
	INIT_WORK(&peer->urgent, urgent_work);
	INIT_WORK(&peer->calm, calm_work);
	spin_lock_init(&peer->tx_lock);
	skb_queue_head_init(&peer->backlog);
}

/* A new incarnation of ours begins; nothing uses the peer yet. */
void kerf_peer_start(struct kerf_peer *peer)
{
	struct kerf_device *dev = peer->dev;

	if (peer->number == dev->me)
		kerf_link_init(&peer->link, &dev->own, 0, 0, kerf_word_generation(kerf_peer_word(&dev->own, 0)));
	else
		kerf_link_init(&peer->link, &dev->region, dev->me, peer->number, dev->generation);
	peer->asleep = false;
	peer->muted = false;
	peer->mute_ms = 0;
	peer->violations = 0;
}

/* Nothing sends to the peer and nothing kicks it any more. */
void kerf_peer_stop(struct kerf_peer *peer)
{
	/* In this order: the urgent one starts the other. */
	cancel_work_sync(&peer->urgent);
	cancel_work_sync(&peer->calm);
	spin_lock_bh(&peer->tx_lock);
	if (peer->link.accepted)
		kerf_link_down(&peer->link);
	spin_unlock_bh(&peer->tx_lock);
	reset_connections(peer);
	if (peer->number != peer->dev->me)
		peer->dev->backend->doorbell(peer->dev, peer->number);
}
