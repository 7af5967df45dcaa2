"""What scenarios need of a network in dom0 that no small program does. Ends with SIGTERM.

    net.py listen ADDRESS PORT FILE     takes one connection and writes what comes to FILE, until the connection ends
    net.py tick ADDRESS PORT            connects and sends a number a few times a second, from 1
    net.py sniff LINK FILE              every frame that arrives on LINK, tags and all, in hexadecimal, a line each
"""

from __future__ import annotations

import socket
import struct
import sys
import time

ETH_P_ALL = 3           # linux/if_ether.h
# linux/if_packet.h
PACKET_ADD_MEMBERSHIP, PACKET_AUXDATA, PACKET_MR_PROMISC = 1, 8, 1
TP_STATUS_VLAN_VALID, TP_STATUS_VLAN_TPID_VALID = 1 << 4, 1 << 6
AUXDATA = struct.Struct("=IIIHHHH")     # struct tpacket_auxdata: status, len, snaplen, mac, net, vlan_tci, vlan_tpid
SOL_PACKET = 263        # linux/socket.h


def family(address: str) -> int:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def listen(address: str, port: str, file: str) -> None:
    server = socket.socket(family(address), socket.SOCK_STREAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.bind((address, int(port)))
    server.listen(1)
    with open(file, "wb", buffering=0) as out:
        connection, _ = server.accept()
        server.close()          # one and no other: what still comes is proof that this connection lives
        while data := connection.recv(65536):
            out.write(data)


def tick(address: str, port: str) -> None:
    connection = socket.create_connection((address, int(port)), 30)
    number = 0
    while True:
        number += 1
        connection.sendall(b"%d\n" % number)
        time.sleep(0.25)


def sniff(link: str, file: str) -> None:
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    packets.bind((link, ETH_P_ALL))
    # struct packet_mreq; otherwise only what is addressed to LINK itself would be seen.
    request = socket.if_nametoindex(link).to_bytes(4, sys.byteorder) + PACKET_MR_PROMISC.to_bytes(2, sys.byteorder) + bytes(10)
    packets.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, request)
    # The kernel has taken the VLAN tag out of the frame and tells it beside it.
    packets.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
    with open(file, "w", buffering=1) as out:
        while True:
            frame, beside, _, (_, _, kind, _, _) = packets.recvmsg(65536, socket.CMSG_SPACE(AUXDATA.size))
            if kind == socket.PACKET_OUTGOING:
                continue
            for level, what, data in beside:
                if level == SOL_PACKET and what == PACKET_AUXDATA:
                    status, *_, tci, tpid = AUXDATA.unpack_from(data)
                    if status & TP_STATUS_VLAN_VALID:
                        tpid = tpid if status & TP_STATUS_VLAN_TPID_VALID else 0x8100
                        frame = frame[:12] + struct.pack(">HH", tpid, tci) + frame[12:]
            out.write(frame.hex() + "\n")


if __name__ == "__main__":
    {"listen": listen, "tick": tick, "sniff": sniff}[sys.argv[1]](*sys.argv[2:])
