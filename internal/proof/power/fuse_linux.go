package main

import (
	"context"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"

	"example.com/keystate/internal/proof/power/lossy"
)

// The losing file system, as the kernel mounts it.

// diskName is the folder in the mounted one in which everything is. It leads to another one after each cut, with inodes that
// the kernel has not seen before: so it has nothing of theirs in its cache.
const diskName = "disk"

// ever is how long the kernel may believe what it knows of a world: nothing in it changes but through the kernel.
const ever = time.Hour

// mountLossy mounts the file system at dir.
func mountLossy(disk *lossy.FS, dir string) (*fuse.Server, error) {
	return fs.Mount(dir, &top{disk: disk}, &fs.Options{
		AttrTimeout: new(ever),
		MountOptions: fuse.MountOptions{
			FsName: "power", Name: "lossy",
			DirectMountStrict:        true,
			ExplicitDataCacheControl: true,
			DisableXAttrs:            true,
			MaxWrite:                 1 << 20,
		},
	})
}

// top is the mounted folder.
type top struct {
	fs.Inode
	disk *lossy.FS
}

func (t *top) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	if name != diskName {
		return nil, syscall.ENOENT
	}
	n := inode(ctx, &t.Inode, t.disk.Root(), out)
	out.SetEntryTimeout(0) // so that the kernel asks again after a cut
	return n, 0
}

func (t *top) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	return fs.NewListDirStream([]fuse.DirEntry{{Name: diskName, Mode: syscall.S_IFDIR}}), 0
}

// A node is a file or folder of one world.
type node struct {
	fs.Inode
	at *lossy.Node
}

// inode makes a node known to the kernel, under parent.
func inode(ctx context.Context, parent *fs.Inode, at *lossy.Node, out *fuse.EntryOut) *fs.Inode {
	s := at.Stat()
	fill(&out.Attr, s)
	out.SetEntryTimeout(ever)
	mode := uint32(syscall.S_IFREG)
	if s.Folder {
		mode = syscall.S_IFDIR
	}
	return parent.NewInode(ctx, &node{at: at}, fs.StableAttr{Mode: mode, Ino: s.ID})
}

func fill(a *fuse.Attr, s lossy.Stat) {
	a.Ino, a.Size, a.Blksize, a.Blocks = s.ID, uint64(s.Size), 4096, uint64(s.Size+511)/512
	a.Mode = s.Mode | syscall.S_IFREG
	a.Nlink = uint32(s.Links)
	if s.Folder {
		a.Mode, a.Nlink = s.Mode|syscall.S_IFDIR, 2
	}
	a.SetTimes(&s.Modified, &s.Modified, &s.Modified)
}

func (n *node) Lookup(ctx context.Context, name string, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	child, err := n.at.Lookup(name)
	if err != nil {
		return nil, fs.ToErrno(err)
	}
	return inode(ctx, &n.Inode, child, out), 0
}

func (n *node) Readdir(context.Context) (fs.DirStream, syscall.Errno) {
	var list []fuse.DirEntry
	for _, name := range n.at.Names() {
		child, err := n.at.Lookup(name)
		if err != nil {
			continue // removed meanwhile
		}
		e := fuse.DirEntry{Name: name, Mode: syscall.S_IFREG}
		if child.Stat().Folder {
			e.Mode = syscall.S_IFDIR
		}
		list = append(list, e)
	}
	return fs.NewListDirStream(list), 0
}

func (n *node) Create(
	ctx context.Context, name string, _ uint32, mode uint32, out *fuse.EntryOut,
) (*fs.Inode, fs.FileHandle, uint32, syscall.Errno) {
	child, err := n.at.Create(name, mode&0o7777)
	if err != nil {
		return nil, nil, 0, fs.ToErrno(err)
	}
	return inode(ctx, &n.Inode, child, out), nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (n *node) Mkdir(ctx context.Context, name string, mode uint32, out *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	child, err := n.at.Mkdir(name, mode&0o7777)
	if err != nil {
		return nil, fs.ToErrno(err)
	}
	return inode(ctx, &n.Inode, child, out), 0
}

func (n *node) Link(
	ctx context.Context, target fs.InodeEmbedder, name string, out *fuse.EntryOut,
) (*fs.Inode, syscall.Errno) {
	file, ok := target.(*node)
	if !ok {
		return nil, syscall.EXDEV
	}
	if err := n.at.Link(file.at, name); err != nil {
		return nil, fs.ToErrno(err)
	}
	return inode(ctx, &n.Inode, file.at, out), 0
}

func (n *node) Unlink(_ context.Context, name string) syscall.Errno {
	return fs.ToErrno(n.at.Unlink(name))
}

func (n *node) Rmdir(_ context.Context, name string) syscall.Errno {
	return fs.ToErrno(n.at.Rmdir(name))
}

func (n *node) Rename(_ context.Context, name string, to fs.InodeEmbedder, as string, flags uint32) syscall.Errno {
	folder, ok := to.(*node)
	if !ok {
		return syscall.EXDEV
	}
	if flags != 0 {
		return syscall.EINVAL
	}
	return fs.ToErrno(n.at.Rename(name, folder.at, as))
}

func (n *node) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_KEEP_CACHE, 0
}

func (n *node) Read(_ context.Context, _ fs.FileHandle, b []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	return fuse.ReadResultData(b[:n.at.ReadAt(b, off)]), 0
}

func (n *node) Write(_ context.Context, _ fs.FileHandle, b []byte, off int64) (uint32, syscall.Errno) {
	n.at.WriteAt(b, off)
	return uint32(len(b)), 0
}

func (n *node) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	n.at.Sync()
	return 0
}

func (n *node) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	fill(&out.Attr, n.at.Stat())
	return 0
}

func (n *node) Setattr(_ context.Context, _ fs.FileHandle, in *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	if mode, ok := in.GetMode(); ok {
		n.at.Chmod(mode & 0o7777)
	}
	if size, ok := in.GetSize(); ok {
		n.at.Truncate(int64(size))
	}
	fill(&out.Attr, n.at.Stat())
	return 0
}

// Statfs tells of a disk that never fills up: keystate takes no new keys on one that does.
func (n *node) Statfs(_ context.Context, out *fuse.StatfsOut) syscall.Errno {
	out.Bsize, out.Frsize, out.NameLen = 4096, 4096, 255
	out.Blocks, out.Bfree, out.Bavail = 1<<20, 1<<19, 1<<19
	out.Files, out.Ffree = 1<<20, 1<<19
	return 0
}
