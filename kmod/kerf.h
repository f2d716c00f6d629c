/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The module's own structures.
 *
 *   socket ── transport.c ─▶ send.c ─────── rings ──▶ memory shared with the peer
 *                                          │
 *   interrupt ── backend ─▶ peer.c ─▶ receive.c ─▶ heartbeat.c, or the vsock core ─▶ socket
 */
#ifndef KERF_H
#define KERF_H

#include <linux/atomic.h>
#include <linux/bitmap.h>
#include <linux/list.h>
#include <linux/mutex.h>
#include <linux/skbuff.h>
#include <linux/spinlock.h>
#include <linux/virtio_vsock.h>
#include <linux/workqueue.h>

#include "kmp.h"
#include "link.h"

/* Packets that one round of a peer's work takes before others get their turn. */
#define KERF_BUDGET_PACKETS	64
/* How long the work of one peer may go before programs in one tick, µs; after that it takes turns with them. */
#define KERF_URGENT_US		5000
#define KERF_TICK_MS		20
/* A tick may last so much longer while the calm work waits for programs, and no longer. */
#define KERF_TICK_MAX_MS	200
/* Packets of one peer that break the rules, in one window, before it is muted; and the window, ms. */
#define KERF_VIOLATIONS_MAX	64
#define KERF_VIOLATIONS_MS	1000
/* How long a peer is muted the first time, ms; twice as long each time after that, up to the longest. */
#define KERF_MUTE_MIN_MS	1000
#define KERF_MUTE_MAX_MS	60000
/* How often peers are looked at without a doorbell, ms: one may get lost, and dead peers do not ring. */
#define KERF_SCAN_MS		100
/* Answers that wait for one peer before its requests are dropped, packets; twice that: its resets too. */
#define KERF_REPLIES_MAX	1024
/* What waits for one peer before sockets have no room to write to it, bytes of memory. */
#define KERF_BACKLOG_DATA	(2 * 1024 * 1024)
/* The same, of whatever kind, before the link is given up, bytes of memory. */
#define KERF_BACKLOG_MAX	(16 * 1024 * 1024)
/* Places of the table in which a socket's waiting CREDIT_UPDATE is found: a power of two, as an exponent. */
#define KERF_CREDITS_BITS	6
/* Places in which connections with waiting packets are counted: a power of two, as an exponent. */
#define KERF_FLOWS_BITS		7
/* Small packets in a row that may go before a packet that waits. */
#define KERF_OVERTAKE_MAX	64
/* Heartbeat connections of one peer. */
#define KERF_HEARTBEATS_MAX	4
/* The payload of one packet; longer ones are sent in several. */
#define KERF_PAYLOAD_MAX	(KERF_PACKET_MAX - sizeof(struct virtio_vsock_hdr))

/* Packets that were taken from the ring and wait for their sockets, bytes of memory; then no more are taken. */
#define KERF_INBOX_MAX		(8 * 1024 * 1024)
/* Packets that one work gives to sockets before others get their turn. */
#define KERF_DELIVERIES		(2 * KERF_BUDGET_PACKETS)

/*
 * The vsock core puts a packet of so many bytes into the buffer of the one before it, where that has room. Without
 * that small packets run into its limit on buffers: those of 6.12.95 reset a socket with 455 of them.
 */
#define KERF_MERGED_MAX		128
/* Data packets with less than this cost more buffer than credit, bytes. */
#define KERF_SMALL_MAX		576
/* What a packet of a message costs its receiver besides its bytes: a buffer, whatever kernel it is, bytes. */
#define KERF_PACKET_COST	1024
/* Packets of messages that a sender lets wait with its peer, however much room the peer has. */
#define KERF_UNREAD_MAX		(KERF_QUEUED_MAX / 2)
/* Packets that wait for a program in one socket, before the next small one resets it. */
#define KERF_QUEUED_MAX		4096
/* What a buffer in which small packets of a stream are merged has room for, bytes. */
#define KERF_SMALL_ROOM		(SKB_WITH_OVERHEAD(2048) - VIRTIO_VSOCK_SKB_HEADROOM)

/* Small packets that may follow one that found its socket empty before the socket is looked into again. */
#define KERF_PASSES		16
/* Places in which connections with such packets are noted: a power of two, as an exponent. */
#define KERF_PASSES_BITS	5

struct kerf_device;

/* A connection whose socket was empty when it was looked into last. */
struct kerf_passes {
	__le32 from, to;	/* ports */
	u32 left;
};

/* A heartbeat connection. Its memory is allocated before a peer connects. */
struct kerf_heartbeat {
	bool used;
	__le64 here, there;	/* the CIDs, as the peer has addressed us */
	u32 port;		/* the peer's */
	u32 received;		/* bytes of the stream that were taken */
	u32 told;		/* of them, what the peer knows */
	u32 sent;		/* bytes of the stream that were sent, or wait in out */
	u32 owes;		/* what is to be sent besides */
	unsigned long heard;	/* jiffies */
	u32 out_len;
	u8 out[2 * KMP_REPLY_MAX];
	struct kerf_kmp kmp;
};

/* The works of a peer. */
enum kerf_worker {
	KERF_NOBODY = 0,
	KERF_URGENT = 1,
	KERF_SUBSTITUTE = 2,
	KERF_CALM = 3,
};

/* How a kind of machine reaches its peers. */
struct kerf_backend {
	const char *name;
	/* Interrupts the peer. In any context, unless @doorbell_sleeps. */
	void (*doorbell)(struct kerf_device *dev, u32 peer);
	bool doorbell_sleeps;
	/* One kernel alone, which talks to itself as CID 1. */
	bool local_only;
};

struct kerf_counters {
	u64 tx_packets, tx_bytes, tx_bulk, tx_waited;
	u64 rx_packets, rx_bytes, rx_bulk;
	u64 rx_dropped;		/* packets that break the rules of packets */
	u64 rx_shed;		/* requests of a peer that does not take its answers */
	atomic64_t rings;	/* doorbells to it, by senders too, without a lock */
	u64 rung;		/* looks at it */
	u64 lost;		/* times that an established link ended */
	u64 quarantined;	/* times that it wrote what it must not */
	u64 mutes;		/* times that it was not listened to for a while */
};

struct kerf_peer {
	struct kerf_device *dev;
	u32 number;

	/*
	 * Everything of this peer but sending is done in its turns, one at a time, none of which waits for a socket:
	 * by an urgent work, which goes before programs, and by the calm one when the peer has used up what it may
	 * have of that. A work that has had its turn then gives the packets to their sockets, one work at a time,
	 * and may have to wait for a socket that a program holds. Where that is the urgent one, its substitute has
	 * the turns meanwhile.
	 */
	struct mutex turn;
	struct work_struct urgent;
	struct work_struct substitute;
	struct work_struct calm;
	struct work_struct drain;	/* sends what waits, beside the turns and beside programs */
	struct sk_buff_head inbox;	/* packets for sockets, in order */
	atomic_t inbox_bytes;		/* the memory that they take */
	atomic_t delivering;		/* which work gives them to their sockets: an enum kerf_worker */
	struct kerf_passes passes[1 << KERF_PASSES_BITS];	/* of the one that delivers */

	/* Protects what follows, and the tx counters. link.rx belongs to the turns. */
	spinlock_t tx_lock;
	struct kerf_link link;
	bool published;			/* since the peer was last looked at for a doorbell */
	bool must_ring;			/* the work is to ring, because a sender could not */
	struct sk_buff_head backlog;	/* packets for which there was no room, in order */
	u32 replies;			/* answers among them */
	u32 waiting;			/* the memory that they take, bytes */
	bool choked;			/* sockets wait for the backlog to shrink */
	u32 flows[1 << KERF_FLOWS_BITS];	/* packets that wait, by their ports */
	u32 overtaken;			/* packets that have gone before the first that waits */
	bool overrun;			/* a packet was lost: the link is to end */
	bool suspect;			/* the ring was found corrupt: likewise */
	bool wants;			/* it was asked for a doorbell when there is room */
	bool heartbeats_wait;		/* and that not for the backlog alone */
	/* The CREDIT_UPDATEs among them, by their ports: at most one for each socket. */
	struct hlist_head credits[1 << KERF_CREDITS_BITS];

	/* Those of its turns. */
	unsigned long tick;		/* jiffies */
	u64 tick_ns;			/* what the urgent works have used of it */
	bool asleep;
	u32 starved;			/* what there was no memory for at once, bytes; 0: nothing */
	struct sk_buff *spare;		/* memory that was waited for, for the next packet */
	bool crowded;			/* the inbox was full */
	DECLARE_BITMAP(ahead, KERF_SLOTS_MAX);	/* slots of heartbeats that were taken before their turn */
	bool muted;
	unsigned long muted_until;	/* jiffies */
	unsigned int mute_ms;		/* how long it was muted last */
	unsigned long window;		/* jiffies */
	unsigned int violations;	/* in the window */
	struct kerf_heartbeat heartbeats[KERF_HEARTBEATS_MAX];

	struct kerf_counters counters;
};

struct kerf_device {
	const struct kerf_backend *backend;
	void *backend_data;
	struct kerf_region region;
	u32 me;
	/* This kernel's way to itself, as the only peer of a region that is not shared; memory is NULL if not ours. */
	struct kerf_region own;
	void *own_memory;
	u32 vectors;
	u32 generation;
	bool started;			/* peers may be kicked */
	int features;			/* what is registered with the vsock core */
	struct workqueue_struct *workqueue;	/* before programs */
	struct workqueue_struct *calm;		/* beside them */
	struct delayed_work scan;
	struct dentry *debugfs;
	struct kerf_peer peers[];	/* region.peers of them */
};

/* transport.c */
extern struct virtio_transport kerf_transport;
int kerf_transport_register(struct kerf_device *dev);
void kerf_transport_unregister(struct kerf_device *dev);
void kerf_transport_reset_peer(u32 cid);
void kerf_transport_wake_writers(u32 cid);

/* meter.c */
int kerf_meter_add(struct vsock_sock *vsk);
void kerf_meter_remove(struct vsock_sock *vsk);
void kerf_meter_count(struct sk_buff *skb);
bool kerf_meter_has_room(struct vsock_sock *vsk);

/* device.c */
extern struct kerf_device __rcu *kerf_the_device;
struct kerf_device *kerf_device_create(const struct kerf_backend *backend, void *backend_data,
				       const struct kerf_region *region, u32 me, u32 vectors);
int kerf_device_start(struct kerf_device *dev);
void kerf_device_stop(struct kerf_device *dev);
void kerf_device_destroy(struct kerf_device *dev);
u32 kerf_cid(const struct kerf_device *dev, u32 peer);
struct kerf_peer *kerf_peer_by_cid(struct kerf_device *dev, u64 cid);

/* peer.c */
void kerf_peer_init(struct kerf_device *dev, u32 number);
void kerf_peer_start(struct kerf_peer *peer);
void kerf_peer_stop(struct kerf_peer *peer);
void kerf_peer_kick(struct kerf_peer *peer);
void kerf_peer_kick_drain(struct kerf_peer *peer);
void kerf_peer_ring(struct kerf_peer *peer);

/* send.c */
bool kerf_peer_has_room(struct kerf_peer *peer);
int kerf_peer_send(struct kerf_peer *peer, struct sk_buff *skb);
bool kerf_peer_put(struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr, const void *payload);
int kerf_drop(struct sk_buff *skb, int error);
void kerf_peer_cancel(struct kerf_peer *peer, struct vsock_sock *vsk);
void kerf_peer_flush(struct kerf_peer *peer);
enum kerf_result kerf_peer_drain(struct kerf_peer *peer);
void kerf_peer_forget_waiting(struct kerf_peer *peer);

/* receive.c */
enum kerf_result kerf_peer_take(struct kerf_peer *peer);
bool kerf_peer_deliver(struct kerf_peer *peer, enum kerf_worker who);
void kerf_peer_forget_inbox(struct kerf_peer *peer);

/* heartbeat.c */
bool kerf_heartbeat_wants(const struct virtio_vsock_hdr *hdr);
void kerf_heartbeat_receive(struct kerf_peer *peer, const struct virtio_vsock_hdr *hdr,
			    const struct kerf_packet *packet);
bool kerf_heartbeat_flush(struct kerf_peer *peer);
void kerf_heartbeat_reset(struct kerf_peer *peer);
int kerf_heartbeat_init(void);

/* panic.c */
void kerf_panic_init(void);
void kerf_panic_exit(void);

/* debugfs.c */
void kerf_debugfs_init(void);
void kerf_debugfs_exit(void);
void kerf_debugfs_add(struct kerf_device *dev);
void kerf_debugfs_remove(struct kerf_device *dev);

/* The backends. */
int kerf_loopback_init(void);
void kerf_loopback_exit(void);
int kerf_ivshmem_init(void);
void kerf_ivshmem_exit(void);
#ifdef CONFIG_MULTIKERNEL
int kerf_multikernel_init(void);
void kerf_multikernel_exit(void);
#else
static inline int kerf_multikernel_init(void)
{
	return -ENODEV;
}

static inline void kerf_multikernel_exit(void)
{
}
#endif

#endif /* KERF_H */
