//! A strict reader of zip archives.
//!
//! Zip says everything twice, in the directory at the end and before each member, and readers that believe
//! different copies see different files. This one reads both, follows neither where they differ, and lists every
//! oddity. PKWARE's APPNOTE 6.3 is the format's reference.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// A member of an archive.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub name: String,
    /// 0 stored, 8 deflated.
    pub method: u16,
    pub flags: u16,
    pub crc: u32,
    pub compressed: u64,
    pub size: u64,
    /// First byte of its data in the file.
    pub start: u64,
    /// Marked as a symbolic link.
    pub link: bool,
}

impl Member {
    pub fn is_dir(&self) -> bool {
        self.name.ends_with('/')
    }

    /// True for more than two hundred times its compressed size, and more than a megabyte: weights and code shrink
    /// to a tenth at most.
    pub fn is_bomb(&self) -> bool {
        self.size > 1 << 20 && self.size / 200 > self.compressed
    }

    /// True for a relative name without `..`, drive letters, backslashes or NUL.
    pub fn has_safe_name(&self) -> bool {
        let name = self.name.trim_end_matches('/');
        !name.is_empty()
            && !name.contains(['\\', '\0', ':'])
            && name.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
    }
}

/// An archive's directory and what is odd about it.
pub(crate) struct Archive {
    file: File,
    pub members: Vec<Member>,
    pub oddities: Vec<String>,
}

const END: u32 = 0x0605_4b50;
const END64: u32 = 0x0606_4b50;
const LOCATOR64: u32 = 0x0706_4b50;
const CENTRAL: u32 = 0x0201_4b50;
const LOCAL: u32 = 0x0403_4b50;

/// Sizes of the fixed parts of the records.
const END_BYTES: usize = 22;
const CENTRAL_BYTES: usize = 46;
const LOCAL_BYTES: usize = 30;

/// More members than any checkpoint has.
const MAX_MEMBERS: u64 = 1 << 20;

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn bad(reason: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason.into())
}

impl Archive {
    /// Reads the directory and every local header.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut oddities = Vec::new();
        let (directory, count, at) = directory(&mut file, length, &mut oddities)?;
        let mut archive = Self { file, members: Vec::new(), oddities };
        archive.parse(&directory, count, at)?;
        archive.compare_with_local_headers(at)?;
        Ok(archive)
    }

    fn odd(&mut self, oddity: String) {
        self.oddities.push(oddity);
    }

    fn parse(&mut self, directory: &[u8], count: u64, directory_at: u64) -> io::Result<()> {
        let mut at = 0;
        let mut names = HashSet::new();
        for _ in 0..count {
            let fixed = directory
                .get(at..at + CENTRAL_BYTES)
                .ok_or_else(|| bad("the directory is truncated"))?;
            if u32_at(fixed, 0) != CENTRAL {
                return Err(bad("a directory record has no signature"));
            }
            let [name_len, extra_len, comment_len] =
                [28, 30, 32].map(|i| usize::from(u16_at(fixed, i)));
            let variable = at + CENTRAL_BYTES;
            let name = directory
                .get(variable..variable + name_len)
                .ok_or_else(|| bad("a name is truncated"))?;
            let extra_at = variable + name_len;
            let extra = directory
                .get(extra_at..extra_at + extra_len)
                .ok_or_else(|| bad("an extra is truncated"))?;
            let name = String::from_utf8_lossy(name).into_owned();
            let mut compressed = u64::from(u32_at(fixed, 20));
            let mut size = u64::from(u32_at(fixed, 24));
            let mut header = u64::from(u32_at(fixed, 42));
            widen(extra, &mut [&mut size, &mut compressed, &mut header]);
            let unix_mode = u32_at(fixed, 38) >> 16;
            let member = Member {
                method: u16_at(fixed, 10),
                flags: u16_at(fixed, 8),
                crc: u32_at(fixed, 16),
                compressed,
                size,
                start: header,
                link: unix_mode & 0o170_000 == 0o120_000,
                name,
            };
            if header >= directory_at {
                return Err(bad(format!(
                    "`{}` begins at {header}, inside or behind the directory",
                    member.name
                )));
            }
            if !names.insert(member.name.clone()) {
                self.odd(format!("`{}` occurs twice", member.name));
            }
            if member.flags & 0x2041 != 0 {
                self.odd(format!("`{}` is marked as encrypted", member.name));
            }
            if !matches!(member.method, 0 | 8) {
                self.odd(format!("`{}` uses compression method {}", member.name, member.method));
            }
            if member.method == 0 && member.compressed != member.size {
                self.odd(format!("`{}` is stored but has two sizes", member.name));
            }
            if !member.has_safe_name() {
                self.odd(format!("`{}` is not a plain relative name", member.name.escape_debug()));
            }
            if member.link {
                self.odd(format!("`{}` is a symbolic link", member.name));
            }
            self.members.push(member);
            at = extra_at + extra_len + comment_len;
        }
        if at != directory.len() {
            self.odd("the directory is longer than its records".to_owned());
        }
        Ok(())
    }

    /// Replaces each member's header offset by that of its data.
    fn compare_with_local_headers(&mut self, directory_at: u64) -> io::Result<()> {
        let mut oddities = Vec::new();
        let mut ranges = Vec::new();
        for member in &mut self.members {
            let header_at = member.start;
            let mut fixed = [0; LOCAL_BYTES];
            self.file.seek(SeekFrom::Start(header_at))?;
            self.file.read_exact(&mut fixed)?;
            if u32_at(&fixed, 0) != LOCAL {
                return Err(bad(format!("`{}` has no local header", member.name)));
            }
            let name_len = usize::from(u16_at(&fixed, 26));
            let extra_len = usize::from(u16_at(&fixed, 28));
            let mut variable = vec![0; name_len + extra_len];
            self.file.read_exact(&mut variable)?;
            let local_name = String::from_utf8_lossy(&variable[..name_len]);
            let mut size = u64::from(u32_at(&fixed, 22));
            let mut compressed = u64::from(u32_at(&fixed, 18));
            widen(&variable[name_len..], &mut [&mut size, &mut compressed]);
            let mut differ = |what: &str, here: String, there: String| {
                oddities.push(format!(
                    "`{}` has {what} {there} in the directory and {here} before it",
                    member.name
                ));
            };
            if local_name != member.name {
                differ(
                    "name",
                    local_name.escape_debug().to_string(),
                    member.name.escape_debug().to_string(),
                );
            }
            if u16_at(&fixed, 8) != member.method {
                differ("method", u16_at(&fixed, 8).to_string(), member.method.to_string());
            }
            if (u16_at(&fixed, 6) ^ member.flags) & 0x2041 != 0 {
                differ("encryption flags", u16_at(&fixed, 6).to_string(), member.flags.to_string());
            }
            // With bit 3 sizes follow the data and may be zero here.
            let streamed = member.flags & 8 != 0;
            for (what, here, there) in
                [("size", size, member.size), ("compressed size", compressed, member.compressed)]
            {
                if here != there && !(streamed && here == 0) {
                    differ(what, here.to_string(), there.to_string());
                }
            }
            let crc = u32_at(&fixed, 14);
            if crc != member.crc && !(streamed && crc == 0) {
                differ("checksum", crc.to_string(), member.crc.to_string());
            }
            member.start = header_at + (LOCAL_BYTES + name_len + extra_len) as u64;
            let end =
                member.start.checked_add(member.compressed).filter(|end| *end <= directory_at);
            let Some(end) = end else {
                return Err(bad(format!("`{}` reaches into the directory", member.name)));
            };
            ranges.push((header_at, end, member.name.clone()));
        }
        ranges.sort();
        if ranges.first().is_some_and(|first| first.0 != 0) {
            oddities.push("something stands before the first member".to_owned());
        }
        for pair in ranges.windows(2) {
            if pair[1].0 < pair[0].1 {
                oddities.push(format!("`{}` and `{}` overlap", pair[0].2, pair[1].2));
            }
            // A data descriptor takes at most 24 bytes; more is room for what no directory names.
            if pair[1].0 > pair[0].1 + 24 {
                oddities.push(format!(
                    "{} bytes behind `{}` belong to no member",
                    pair[1].0 - pair[0].1,
                    pair[0].2
                ));
            }
        }
        if ranges.last().is_some_and(|last| directory_at > last.1 + 24) {
            oddities.push("bytes before the directory belong to no member".to_owned());
        }
        self.oddities.extend(oddities);
        Ok(())
    }

    /// A member's decompressed bytes. The reader fails where length or checksum are not those of the directory.
    pub fn read(&self, member: &Member) -> io::Result<impl Read + use<>> {
        let mut file = self.file.try_clone()?;
        file.seek(SeekFrom::Start(member.start))?;
        let raw = BufReader::with_capacity(1 << 16, file).take(member.compressed);
        let inner: Box<dyn Read> = match member.method {
            0 => Box::new(raw),
            8 => Box::new(flate2::bufread::DeflateDecoder::new(BufReader::new(raw))),
            other => return Err(bad(format!("`{}` uses compression method {other}", member.name))),
        };
        Ok(Checked {
            inner,
            left: member.size,
            want: member.crc,
            crc: flate2::Crc::new(),
            name: member.name.clone(),
        })
    }
}

/// Gives exactly the promised bytes or fails.
struct Checked {
    inner: Box<dyn Read>,
    left: u64,
    want: u32,
    crc: flate2::Crc,
    name: String,
}

impl Read for Checked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let n = self.inner.read(buffer)?;
        if n as u64 > self.left {
            return Err(bad(format!("`{}` is longer than the directory says", self.name)));
        }
        if n == 0 {
            if self.left > 0 {
                return Err(bad(format!("`{}` ends {} bytes early", self.name, self.left)));
            }
            if self.crc.sum() != self.want {
                return Err(bad(format!(
                    "`{}` has another checksum than the directory says",
                    self.name
                )));
            }
        }
        self.left -= n as u64;
        self.crc.update(&buffer[..n]);
        Ok(n)
    }
}

/// Finds the directory: its bytes, its number of records and where it begins.
fn directory(
    file: &mut File,
    length: u64,
    oddities: &mut Vec<String>,
) -> io::Result<(Vec<u8>, u64, u64)> {
    let tail_len = length.min((END_BYTES + 0xffff) as u64);
    file.seek(SeekFrom::Start(length - tail_len))?;
    let mut tail = vec![0; tail_len as usize];
    file.read_exact(&mut tail)?;
    let found: Vec<usize> = (0..(tail.len() + 1).saturating_sub(END_BYTES))
        .filter(|&at| u32_at(&tail, at) == END)
        .filter(|&at| at + END_BYTES + usize::from(u16_at(&tail, at + 20)) <= tail.len())
        .collect();
    let &end = found
        .last()
        .ok_or_else(|| bad("there is no end-of-directory record; the file is cut off or no zip"))?;
    if found.len() > 1 {
        oddities.push("there are several end-of-directory records".to_owned());
    }
    if end + END_BYTES + usize::from(u16_at(&tail, end + 20)) != tail.len() {
        oddities.push("data stands behind the archive".to_owned());
    }
    if u16_at(&tail, end + 20) != 0 {
        oddities.push("the archive has a comment".to_owned());
    }
    let end_at = length - tail_len + end as u64;
    let mut count = u64::from(u16_at(&tail, end + 10));
    let mut size = u64::from(u32_at(&tail, end + 12));
    let mut at = u64::from(u32_at(&tail, end + 16));
    let mut behind = end_at;
    if end >= 20 && u32_at(&tail, end - 20) == LOCATOR64 {
        let record = u64_at(&tail, end - 20 + 8);
        let mut fixed = [0; 56];
        file.seek(SeekFrom::Start(record))?;
        file.read_exact(&mut fixed)?;
        if u32_at(&fixed, 0) != END64 {
            return Err(bad("the 64-bit end record has no signature"));
        }
        let wide = [u64_at(&fixed, 32), u64_at(&fixed, 40), u64_at(&fixed, 48)];
        for (narrow, wide, mask) in
            [(count, wide[0], 0xffff), (size, wide[1], 0xffff_ffff), (at, wide[2], 0xffff_ffff)]
        {
            if narrow != mask && narrow != wide {
                oddities.push("the two end records disagree".to_owned());
            }
        }
        [count, size, at] = wide;
        behind = record;
    }
    if count > MAX_MEMBERS {
        return Err(bad(format!("it claims {count} members")));
    }
    let fits = at.checked_add(size).is_some_and(|end| end <= behind);
    if !fits {
        return Err(bad("the directory reaches beyond its end record"));
    }
    if at + size != behind {
        oddities.push("bytes stand between the directory and its end record".to_owned());
    }
    let mut bytes = vec![0; size as usize];
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(&mut bytes)?;
    Ok((bytes, count, at))
}

/// Replaces sizes that read `0xffffffff` by those of the zip64 extra field, in its fixed order.
fn widen(mut extra: &[u8], fields: &mut [&mut u64]) {
    while extra.len() >= 4 {
        let (id, len) = (u16_at(extra, 0), usize::from(u16_at(extra, 2)));
        let Some(mut body) = extra.get(4..4 + len) else { return };
        if id == 1 {
            for field in fields.iter_mut().filter(|field| ***field == 0xffff_ffff) {
                if body.len() < 8 {
                    return;
                }
                **field = u64_at(body, 0);
                body = &body[8..];
            }
        }
        extra = &extra[4 + len..];
    }
}
