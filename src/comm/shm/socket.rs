//! Unix sockets as the job uses them: SEQPACKET (a message is whole or absent, an end is seen), non-blocking,
//! close-on-exec, named in the abstract space (no file), able to carry one file descriptor a message.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

/// Longest message.
pub const MAX_MESSAGE: usize = 8 * 1024;
const FLAGS: libc::c_int = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
/// Descriptors a message may carry before the kernel cuts the rest off.
const MAX_FDS: usize = 4;

/// What `receive` found.
pub enum Received {
    /// No message yet.
    Nothing,
    /// The other end is closed.
    Closed,
    Message(Vec<u8>, Option<OwnedFd>),
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    match fd {
        // SAFETY: every caller passes the result of a call that made a new descriptor.
        0.. => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

fn done(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The abstract address `name` (at most 100 bytes) and its length.
fn address(name: &str) -> (libc::sockaddr_un, libc::socklen_t) {
    assert!(name.len() <= 100);
    // SAFETY: all zero is a valid address.
    let mut a: libc::sockaddr_un = unsafe { zeroed() };
    a.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, from) in a.sun_path[1..].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    (a, (std::mem::offset_of!(libc::sockaddr_un, sun_path) + 1 + name.len()) as libc::socklen_t)
}

/// Two connected ends.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [-1; 2];
    // SAFETY: the array has room for two descriptors.
    done(unsafe { libc::socketpair(libc::AF_UNIX, FLAGS, 0, fds.as_mut_ptr()) })?;
    Ok((owned(fds[0])?, owned(fds[1])?))
}

/// Takes the abstract name; `EADDRINUSE` if somebody has it.
pub fn listen(name: &str) -> io::Result<OwnedFd> {
    // SAFETY: plain calls; the address outlives them.
    unsafe {
        let fd = owned(libc::socket(libc::AF_UNIX, FLAGS, 0))?;
        let (a, len) = address(name);
        done(libc::bind(fd.as_raw_fd(), (&raw const a).cast(), len))?;
        done(libc::listen(fd.as_raw_fd(), 256))?;
        Ok(fd)
    }
}

/// Connects to the abstract name; `ECONNREFUSED` if nobody listens.
pub fn connect(name: &str) -> io::Result<OwnedFd> {
    // SAFETY: plain calls; the address outlives them.
    unsafe {
        let fd = owned(libc::socket(libc::AF_UNIX, FLAGS, 0))?;
        let (a, len) = address(name);
        done(libc::connect(fd.as_raw_fd(), (&raw const a).cast(), len))?;
        Ok(fd)
    }
}

/// The next waiting connection, if there is one.
pub fn accept(fd: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no address is asked for.
    match owned(unsafe { libc::accept4(fd.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut(), flags) }) {
        Ok(connection) => Ok(Some(connection)),
        Err(e) => match e.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR | libc::ECONNABORTED) => Ok(None),
            _ => Err(e),
        },
    }
}

/// Process and user at the other end, from the kernel.
pub fn peer(fd: BorrowedFd<'_>) -> io::Result<(u32, u32)> {
    // SAFETY: `cred` is plain data of the length given.
    unsafe {
        let mut cred: libc::ucred = zeroed();
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        let to = (&raw mut cred).cast();
        done(libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, to, &mut len))?;
        Ok((cred.pid as u32, cred.uid))
    }
}

/// Aligned room for the descriptors that travel with a message.
#[repr(C, align(16))]
struct Ancillary([u8; 64]);

/// Sends one message, with a descriptor if given; waits for room until `deadline`.
pub fn send(fd: BorrowedFd<'_>, bytes: &[u8], carry: Option<BorrowedFd<'_>>, deadline: Instant) -> io::Result<()> {
    assert!(!bytes.is_empty() && bytes.len() <= MAX_MESSAGE, "a message of {} bytes", bytes.len());
    loop {
        let mut space = Ancillary([0; 64]);
        let mut part = libc::iovec { iov_base: bytes.as_ptr() as *mut _, iov_len: bytes.len() };
        // SAFETY: the header points at live memory of the stated sizes; CMSG_FIRSTHDR is not null because the
        // ancillary space holds one header.
        let sent = unsafe {
            let mut m: libc::msghdr = zeroed();
            m.msg_iov = &mut part;
            m.msg_iovlen = 1;
            if let Some(carried) = carry {
                m.msg_control = space.0.as_mut_ptr().cast();
                m.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as _;
                let c = libc::CMSG_FIRSTHDR(&m);
                (*c).cmsg_level = libc::SOL_SOCKET;
                (*c).cmsg_type = libc::SCM_RIGHTS;
                (*c).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
                libc::CMSG_DATA(c).cast::<RawFd>().write_unaligned(carried.as_raw_fd());
            }
            libc::sendmsg(fd.as_raw_fd(), &m, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
        };
        if sent >= 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        let retry = match e.raw_os_error() {
            Some(libc::EINTR) => true,
            Some(libc::EAGAIN) => {
                let mut p = [pollfd(Some(fd), libc::POLLOUT)];
                poll(&mut p, Duration::from_millis(20))?;
                true
            }
            // Too many descriptors in flight: the receivers are taking them.
            Some(libc::ETOOMANYREFS) => {
                std::thread::sleep(Duration::from_millis(1));
                true
            }
            _ => false,
        };
        if !retry || Instant::now() >= deadline {
            return Err(e);
        }
    }
}

/// The next message, without waiting.
pub fn receive(fd: BorrowedFd<'_>) -> io::Result<Received> {
    let mut bytes = vec![0u8; MAX_MESSAGE];
    let mut reset = false;
    loop {
        let mut space = Ancillary([0; 64]);
        let mut part = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        let mut carried = Vec::new();
        // SAFETY: the header points at live memory of the stated sizes; the kernel wrote whole control messages, whose
        // SCM_RIGHTS data are new descriptors of ours.
        let got = unsafe {
            let mut m: libc::msghdr = zeroed();
            m.msg_iov = &mut part;
            m.msg_iovlen = 1;
            m.msg_control = space.0.as_mut_ptr().cast();
            m.msg_controllen = libc::CMSG_SPACE((MAX_FDS * size_of::<RawFd>()) as u32) as _;
            let got = libc::recvmsg(fd.as_raw_fd(), &mut m, libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT);
            let mut c = if got >= 0 { libc::CMSG_FIRSTHDR(&m) } else { std::ptr::null_mut() };
            while !c.is_null() {
                if (*c).cmsg_level == libc::SOL_SOCKET && (*c).cmsg_type == libc::SCM_RIGHTS {
                    let count = ((*c).cmsg_len as usize - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                    let data = libc::CMSG_DATA(c).cast::<RawFd>();
                    carried.extend((0..count).map(|i| OwnedFd::from_raw_fd(data.add(i).read_unaligned())));
                }
                c = libc::CMSG_NXTHDR(&m, c);
            }
            got
        };
        match got {
            0 => return Ok(Received::Closed),
            1.. => {
                bytes.truncate(got as usize);
                return Ok(Received::Message(bytes, carried.into_iter().next()));
            }
            _ => {}
        }
        let e = io::Error::last_os_error();
        match e.raw_os_error() {
            Some(libc::EINTR) => {}
            // Reported once, before what the other end sent last; a second time it is the end.
            Some(libc::ECONNRESET) if !reset => reset = true,
            Some(libc::ECONNRESET) => return Ok(Received::Closed),
            Some(libc::EAGAIN) if reset => return Ok(Received::Closed),
            Some(libc::EAGAIN) => return Ok(Received::Nothing),
            _ => return Err(e),
        }
    }
}

/// An entry for `poll`; `None` is skipped by it.
pub fn pollfd(fd: Option<BorrowedFd<'_>>, events: libc::c_short) -> libc::pollfd {
    libc::pollfd { fd: fd.map_or(-1, |f| f.as_raw_fd()), events, revents: 0 }
}

/// Waits for an event, a signal or the end of `timeout`.
pub fn poll(fds: &mut [libc::pollfd], timeout: Duration) -> io::Result<()> {
    let ms = timeout.as_micros().div_ceil(1000).min(60_000) as libc::c_int;
    // SAFETY: the array is valid for its length.
    match done(unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, ms) }) {
        Err(e) if e.raw_os_error() == Some(libc::EINTR) => {
            fds.iter_mut().for_each(|f| f.revents = 0);
            Ok(())
        }
        other => other,
    }
}

/// Whether the other end is gone.
pub fn hung_up(p: &libc::pollfd) -> bool {
    p.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLRDHUP | libc::POLLNVAL) != 0
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    #[test]
    fn messages_carry_descriptors_and_the_end_is_seen() {
        let (a, b) = pair().unwrap();
        let (c, d) = pair().unwrap();
        assert!(matches!(receive(b.as_fd()).unwrap(), Received::Nothing));
        send(a.as_fd(), b"take", Some(c.as_fd()), soon()).unwrap();
        drop(c);
        let Received::Message(bytes, Some(carried)) = receive(b.as_fd()).unwrap() else { panic!("no message") };
        assert_eq!(bytes, b"take");
        send(carried.as_fd(), b"hi", None, soon()).unwrap();
        assert!(matches!(receive(d.as_fd()).unwrap(), Received::Message(m, None) if m == b"hi"));
        drop(a);
        let mut p = [pollfd(Some(b.as_fd()), 0)];
        poll(&mut p, Duration::ZERO).unwrap();
        assert!(hung_up(&p[0]));
        assert!(matches!(receive(b.as_fd()).unwrap(), Received::Closed));
    }

    #[test]
    fn a_reset_does_not_hide_the_last_message() {
        let (a, b) = pair().unwrap();
        send(a.as_fd(), b"never read", None, soon()).unwrap();
        send(b.as_fd(), b"last words", None, soon()).unwrap();
        drop(b);
        assert!(matches!(receive(a.as_fd()).unwrap(), Received::Message(m, None) if m == b"last words"));
        assert!(matches!(receive(a.as_fd()).unwrap(), Received::Closed));
    }

    #[test]
    fn a_name_has_one_owner_and_the_kernel_tells_who_connects() {
        let name = format!("fsdp-test-socket-{}", std::process::id());
        assert_eq!(connect(&name).unwrap_err().raw_os_error(), Some(libc::ECONNREFUSED));
        let listener = listen(&name).unwrap();
        assert_eq!(listen(&name).unwrap_err().raw_os_error(), Some(libc::EADDRINUSE));
        assert!(accept(listener.as_fd()).unwrap().is_none());
        let client = connect(&name).unwrap();
        let server = accept(listener.as_fd()).unwrap().unwrap();
        // SAFETY: takes no argument, cannot fail.
        let me = (std::process::id(), unsafe { libc::geteuid() });
        assert_eq!(peer(server.as_fd()).unwrap(), me);
        assert_eq!(peer(client.as_fd()).unwrap(), me);
    }
}
