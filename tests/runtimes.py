"""The container runtimes in which `strict` is tried: the command prefixes as `SiteConfig.sandbox_command` takes them."""

BUBBLEWRAP: tuple[str | tuple[str, ...], ...] = (
    "bwrap", "--unshare-all", "--die-with-parent", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp",
    ("--ro-bind", "{readable}", "{readable}"), "--remount-ro", "/", "--",
)  # fmt: skip
