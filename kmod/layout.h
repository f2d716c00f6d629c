/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The shared memory of kerf-vsock, version 1: docs/kerf-vsock.md says what each word means and who
 * writes it. kerf-ring/golden/layout.def holds the same numbers for both languages; ring.c asserts
 * that they agree.
 */
#ifndef KERF_LAYOUT_H
#define KERF_LAYOUT_H

#include "kerf_port.h"

/* The bytes "KERFVSK1". */
#define KERF_MAGIC		0x314b53564652454bULL
#define KERF_VERSION		1

#define KERF_PEERS_MAX		64
#define KERF_SLOTS_MIN		32
#define KERF_SLOTS_MAX		1024
#define KERF_BYTES_MIN		(64 * 1024)
#define KERF_BYTES_MAX		(16 * 1024 * 1024)

/* Slots that only control packets may take: where data has filled the ring and nothing waits, they find room. */
#define KERF_SLOTS_RESERVED	8
/* Longest packet that goes inline: header and payload, under 256 bytes. */
#define KERF_INLINE_MAX		255
#define KERF_SLOT_SIZE		256
/* Longest packet: a receiver's buffer for it, with the kernel's bookkeeping, is at most 32 KiB. */
#define KERF_PACKET_MAX		(32 * 1024 - 512)
/* Packets begin at multiples of this in the byte ring. */
#define KERF_BYTES_ALIGN	64

#define KERF_PEERS_OFFSET	4096
#define KERF_PAGE		4096
#define KERF_REASON_MAX		112

/* A descriptor's kinds. */
#define KERF_KIND_INLINE	1
#define KERF_KIND_BULK		2

/* How long a link that was lost stays down the first time, ms; twice as long each time after that, to the longest. */
#define KERF_RETRY_MIN_MS	1000
#define KERF_RETRY_MAX_MS	60000

/* States of a peer. */
#define KERF_PEER_ABSENT	0
#define KERF_PEER_STARTING	1
#define KERF_PEER_READY		2
#define KERF_PEER_LEFT		3
#define KERF_PEER_PANICKED	4

struct kerf_header {
	__le64 magic;
	__le32 version;
	__le32 peers;
	__le32 slots;
	__le32 bytes;
	__le64 size;
};

/* One for each peer, written by that peer only. */
struct kerf_peer_entry {
	__le64 word;			/* state in the low half, generation in the high half */
	__le32 vectors;
	__le32 reason_len;
	u8 reason[KERF_REASON_MAX];
	u8 reserved[128];
};

/* One for each directed pair of peers; inline slots and then the bytes follow the descriptors. */
struct kerf_ring_mem {
	/* written by the sender only */
	__le32 head;
	__le32 want;
	__le64 ack;			/* the receiver's name that the sender has accepted; 0: none */
	__le64 begun;			/* the sender's own name: round in the low half, generation in the high half */
	u8 sender_reserved[104];
	/* written by the receiver only */
	__le32 tail;
	__le32 freed;
	__le32 wake;
	u8 receiver_reserved[116];
	/* written by the sender only */
	__le64 descriptors[];
};

#endif /* KERF_LAYOUT_H */
