"""Writing: files for later, files of others, links, modes, other names for the same."""

from tests.attack.corpus.attempt import Attempt

A = Attempt
_FOLDER = "os.path.dirname(os.path.realpath(os.__file__))"

WRITES = (
    A("write where anybody may", "open(SCRATCH + '/left', 'w').write('x')", "EACCES"),
    A("write to /tmp", "open(f'/tmp/edif-escape-{PORT}', 'w').write('x')", "EACCES"),
    A("write to /dev/shm", "open(f'/dev/shm/edif-escape-{PORT}', 'w').write('x')", "EACCES"),
    A("write without a name", "os.open(SCRATCH, os.O_TMPFILE | os.O_RDWR)", "EACCES"),
    A("change a file of others", "open(TARGET, 'r+').write('x')", "EACCES"),
    A("append to a file of others", "open(TARGET, 'a').write('x')", "EACCES"),
    A("cut a file of others", "os.truncate(TARGET, 0)"),
    A("open the library for writing", "open(os.__file__, 'r+')", "EACCES", root=True),
    A("open the library's folder for a new module", f"os.open({_FOLDER}, os.O_TMPFILE | os.O_RDWR)", "EACCES", root=True),
    A("open another model's folder for writing", "os.open(OTHER, os.O_TMPFILE | os.O_RDWR)", "EACCES"),
    A("make a folder", "os.mkdir(SCRATCH + '/folder')"),
    A("delete a file of others", "os.unlink(TARGET)"),
    A("rename a file of others", "os.rename(TARGET, SCRATCH + '/renamed')"),
    A("delete a folder", "os.mkdir(SCRATCH + '/gone'); os.rmdir(SCRATCH + '/gone')"),
    A("change a mode", "os.chmod(TARGET, 0o600)"),
    A("change an owner", "os.chown(TARGET, os.getuid(), os.getgid())"),
    A("change a time", "os.utime(TARGET)"),
    A("set an attribute", "os.setxattr(TARGET, 'user.edif', b'x')"),
    A("a hard link", "os.link(TARGET, SCRATCH + '/linked')"),
    A("a symbolic link", "os.symlink(TARGET, SCRATCH + '/symlinked')"),
    A("a named pipe", "os.mkfifo(SCRATCH + '/pipe')"),
    A("a device node", "os.mknod(SCRATCH + '/null', 0o020666, os.makedev(1, 3))", root=True),
    A("a file in memory", "os.memfd_create('x')"),
    A("a secret file in memory", "call(447, 447, 0)"),
    A("a lease on a file", "fcntl.fcntl(os.open(os.__file__, 0), 1024, 0)", root=True),
    A("a lock on a file", "fcntl.flock(os.open(os.__file__, 0), 2)"),
    A("watch a folder", "call(294, 26, 0)"),
    A("watch a file system", "call(300, 262, 0, 0)", root=True),
    A("change the working folder", "os.chdir('/')"),
    A("change the root folder", "os.chroot('/')", root=True),
    A("a control group", "os.mkdir('/sys/fs/cgroup/edif-escape')\nos.rmdir('/sys/fs/cgroup/edif-escape')", root=True),
    A("a setting of the kernel", "open('/proc/sys/kernel/core_pattern', 'r+')", "EACCES", root=True),
)  # fmt: skip
