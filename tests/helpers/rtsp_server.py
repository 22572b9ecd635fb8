"""An RTSP server by GStreamer, run by the Python that has its bindings (Debian's own).

``/usr/bin/python3 rtsp_server.py CLIP.mp4 [PORT]`` prints its port and serves the clip's H.264
video at its own pace, from the first frame for each client: as /open to anybody, and as /locked to
the user ``bob`` with the password ``hunter2``.
"""

from __future__ import annotations

import sys

import gi

for namespace in ("Gst", "GstRtsp", "GstRtspServer"):
    gi.require_version(namespace, "1.0")
from gi.repository import GLib, Gst, GstRtsp, GstRtspServer  # noqa: E402

ROLE = "media.factory.role"
ANYBODY, MEMBER = "anybody", "member"


def main(clip: str, port: str = "0") -> None:
    """Serve until killed; port 0 takes a free one."""
    Gst.init(None)
    server = GstRtspServer.RTSPServer(address="127.0.0.1", service=port)
    server.set_auth(one_account())
    mounts = server.get_mount_points()
    mounts.add_factory("/open", factory(clip, ANYBODY, MEMBER))
    mounts.add_factory("/locked", factory(clip, MEMBER))  # for others: 401
    if not server.attach(None):
        sys.exit(f"cannot listen on port {port}")
    sys.stdout.write(f"{server.get_bound_port()}\n")
    sys.stdout.flush()
    GLib.MainLoop().run()


def factory(clip: str, *welcome: str) -> GstRtspServer.RTSPMediaFactory:
    """What makes a pipeline for each client of these roles; others are asked to log in."""
    made = GstRtspServer.RTSPMediaFactory()
    made.set_launch(f'( filesrc location="{clip}" ! qtdemux ! rtph264pay name=pay0 pt=96 )')
    permissions = GstRtspServer.RTSPPermissions()
    for role in (ANYBODY, MEMBER):
        permissions.add_permission_for_role(role, "media.factory.access", True)  # else 404
        permissions.add_permission_for_role(role, "media.factory.construct", role in welcome)
    made.set_permissions(permissions)
    return made


def one_account() -> GstRtspServer.RTSPAuth:
    """Digest authentication for bob; whoever has no account is anybody."""
    auth = GstRtspServer.RTSPAuth()
    auth.set_supported_methods(GstRtsp.RTSPAuthMethod.DIGEST)
    auth.add_digest("bob", "hunter2", token(MEMBER))
    auth.set_default_token(token(ANYBODY))
    return auth


def token(role: str) -> GstRtspServer.RTSPToken:
    """What a client may do."""
    made = GstRtspServer.RTSPToken()
    made.set_string(ROLE, role)
    return made


if __name__ == "__main__":
    main(*sys.argv[1:])
