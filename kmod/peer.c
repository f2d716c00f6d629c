// SPDX-License-Identifier: GPL-2.0
/*
 * One peer: its link, and which work serves it when.
 *
 * Each peer has its own works, so that one that floods, stalls or lies costs its own turns only. They go before
 * programs for KERF_URGENT_US in each tick, so that a heartbeat does not wait for a program; what a peer causes
 * beyond that takes turns with programs. What is sent is in send.c, what comes in receive.c.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/jiffies.h>
#include <linux/module.h>
#include <linux/sched/clock.h>

#include "kerf.h"

/*
 * Whether the peer has had what it may have of this tick. Outside of a turn it may be wrong by one turn. A tick does
 * not end while the calm work waits for programs, up to a bound: on a machine whose own host is busy a tick may pass in
 * which they had nothing.
 */
static bool tick_is_used_up(struct kerf_peer *peer)
{
	unsigned long tick = READ_ONCE(peer->tick);

	/* The calm work may be asleep with a socket's lock: heartbeats do not wait for it. */
	if (time_after(jiffies, tick + msecs_to_jiffies(KERF_TICK_MAX_MS)))
		return false;
	if (time_after(jiffies, tick + msecs_to_jiffies(KERF_TICK_MS)))
		return work_pending(&peer->calm);
	return READ_ONCE(peer->tick_ns) > KERF_URGENT_US * NSEC_PER_USEC;
}

/* Adds the time that an urgent work took. In a turn. */
static void use_tick(struct kerf_peer *peer, u64 ns)
{
	if (time_after(jiffies, peer->tick + msecs_to_jiffies(KERF_TICK_MS))) {
		WRITE_ONCE(peer->tick_ns, 0);
		WRITE_ONCE(peer->tick, jiffies);
	}
	WRITE_ONCE(peer->tick_ns, peer->tick_ns + ns);
}

/*
 * Queues the work that may have the next turn. A peer that has used up its tick goes to the calm one at once: an
 * urgent work that only passes the turn on would cost each packet a second wakeup. In any context; nothing happens
 * before kerf_device_start() is done.
 */
void kerf_peer_kick(struct kerf_peer *peer)
{
	struct kerf_device *dev = peer->dev;

	/* Pairs with the release in kerf_device_start(): the peers are initialized. */
	if (!smp_load_acquire(&dev->started))
		return;
	/* It may be for the room that was waited for. */
	if (!skb_queue_empty_lockless(&peer->backlog))
		queue_work(dev->calm, &peer->drain);
	if (tick_is_used_up(peer))
		queue_work(dev->calm, &peer->calm);
	else if (atomic_read(&peer->delivering) == KERF_URGENT)
		queue_work(dev->workqueue, &peer->substitute);
	else
		queue_work(dev->workqueue, &peer->urgent);
}

/* Queues the work that sends what waits. Likewise. */
void kerf_peer_kick_drain(struct kerf_peer *peer)
{
	struct kerf_device *dev = peer->dev;

	/* As above. */
	if (smp_load_acquire(&dev->started))
		queue_work(dev->calm, &peer->drain);
}

/* Not under tx_lock; in process context where the backend's doorbell sleeps. */
void kerf_peer_ring(struct kerf_peer *peer)
{
	struct kerf_device *dev = peer->dev;

	atomic64_inc(&peer->counters.rings);
	if (peer->number == dev->me)
		kerf_peer_kick(peer);
	else
		dev->backend->doorbell(dev, peer->number);
}

/* Connections have ended: sockets, heartbeats and what waited. */
static void reset_connections(struct kerf_peer *peer)
{
	kerf_peer_forget_waiting(peer);
	kerf_peer_forget_inbox(peer);
	kerf_heartbeat_reset(peer);
	kerf_transport_reset_peer(kerf_cid(peer->dev, peer->number));
	if (peer->number == peer->dev->me)
		kerf_transport_reset_peer(VMADDR_CID_LOCAL);
}

static u64 now_ms(void)
{
	return jiffies64_to_msecs(get_jiffies_64());
}

static void quarantine(struct kerf_peer *peer, const char *what)
{
	bool blamed, tell;

	spin_lock_bh(&peer->tx_lock);
	blamed = kerf_link_corrupt(&peer->link, now_ms());
	tell = peer->link.tell;
	peer->link.tell = false;
	spin_unlock_bh(&peer->tx_lock);
	peer->counters.lost++;
	if (blamed) {
		peer->counters.quarantined++;
		pr_warn_ratelimited("peer %u %s; its link stays down for %u ms\n",
				    peer->number, what, peer->link.retry_ms);
	}
	reset_connections(peer);
	if (tell)
		kerf_peer_ring(peer);
}

/* Looks at the peer; returns whether the link is up. */
static bool look(struct kerf_peer *peer)
{
	enum kerf_link_event event;
	bool tell;

	spin_lock_bh(&peer->tx_lock);
	event = kerf_link_poll(&peer->link, now_ms());
	tell = peer->link.tell;
	peer->link.tell = false;
	spin_unlock_bh(&peer->tx_lock);
	if (tell)
		kerf_peer_ring(peer);
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

/* What is to follow a turn. */
enum after {
	REST,		/* nothing; the scan looks again */
	SLEEP,		/* wait for the peer's doorbell */
	WAIT,		/* likewise, though there is something that cannot be taken now */
	GO_ON,		/* another turn at once */
};

/* One turn: looks, takes, answers. */
static enum after take_turn(struct kerf_peer *peer)
{
	enum kerf_result result;

	peer->counters.rung++;
	if (!look(peer))
		return REST;
	if (peer->asleep) {
		kerf_consumer_awake(&peer->link.rx);
		peer->asleep = false;
	}
	result = kerf_peer_take(peer);
	if (result == KERF_CORRUPT || READ_ONCE(peer->suspect)) {
		quarantine(peer, "wrote invalid indices or descriptors");
		return REST;
	}
	if (READ_ONCE(peer->overrun)) {
		quarantine(peer, "does not read its ring");
		return REST;
	}
	kerf_peer_flush(peer);
	if (result == KERF_OK)
		return GO_ON;
	if (result != KERF_FULL)
		return SLEEP;
	return peer->muted ? REST : WAIT;
}

/* Asks for a doorbell when something comes; returns whether something has come already. */
static bool fall_asleep(struct kerf_peer *peer)
{
	struct kerf_packet packet;

	if (!peer->link.up || peer->asleep)
		return false;
	kerf_consumer_sleep(&peer->link.rx);
	peer->asleep = true;
	return kerf_consumer_peek(&peer->link.rx, &packet) != KERF_EMPTY;
}

/*
 * A turn, and then what may sleep; meanwhile another work can have a turn. It asks for a doorbell only after the
 * sockets have got their packets, so that a busy peer does not ring. Where a socket makes that wait, the scan
 * starts the other work, which asks.
 */
static void work(struct kerf_peer *peer, enum kerf_worker who)
{
	enum after after;
	bool more;
	u64 start;

	mutex_lock(&peer->turn);
	start = local_clock();
	after = take_turn(peer);
	mutex_unlock(&peer->turn);
	more = kerf_peer_deliver(peer, who);
	mutex_lock(&peer->turn);
	if ((after == SLEEP || after == WAIT) && !more)
		more = fall_asleep(peer) && after == SLEEP;
	if (who != KERF_CALM)
		use_tick(peer, local_clock() - start);
	mutex_unlock(&peer->turn);
	if (more || after == GO_ON)
		kerf_peer_kick(peer);
}

static void calm_work(struct work_struct *item)
{
	work(container_of(item, struct kerf_peer, calm), KERF_CALM);
}

static void urgent_work(struct work_struct *item)
{
	work(container_of(item, struct kerf_peer, urgent), KERF_URGENT);
}

static void substitute_work(struct work_struct *item)
{
	work(container_of(item, struct kerf_peer, substitute), KERF_SUBSTITUTE);
}

/* In no turn, so neither heartbeats nor what comes wait for it. */
static void drain_work(struct work_struct *item)
{
	struct kerf_peer *peer = container_of(item, struct kerf_peer, drain);

	switch (kerf_peer_drain(peer)) {
	case KERF_OK:
		kerf_peer_kick_drain(peer);
		break;
	case KERF_CORRUPT:
		/* A turn judges. */
		kerf_peer_kick(peer);
		break;
	default:
		break;
	}
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
	INIT_WORK(&peer->substitute, substitute_work);
	INIT_WORK(&peer->calm, calm_work);
	INIT_WORK(&peer->drain, drain_work);
	spin_lock_init(&peer->tx_lock);
	skb_queue_head_init(&peer->backlog);
	skb_queue_head_init(&peer->inbox);
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
	int round;

	/*
	 * Each of these queues the others as long as it has seen dev->started. One that ran into the first round may
	 * have queued another, which sees that the device has stopped.
	 */
	for (round = 0; round < 2; round++) {
		cancel_work_sync(&peer->urgent);
		cancel_work_sync(&peer->substitute);
		cancel_work_sync(&peer->calm);
		cancel_work_sync(&peer->drain);
	}
	spin_lock_bh(&peer->tx_lock);
	if (peer->link.accepted)
		kerf_link_down(&peer->link);
	spin_unlock_bh(&peer->tx_lock);
	reset_connections(peer);
	kfree_skb(peer->spare);
	peer->spare = NULL;
	if (peer->number != peer->dev->me)
		peer->dev->backend->doorbell(peer->dev, peer->number);
}
