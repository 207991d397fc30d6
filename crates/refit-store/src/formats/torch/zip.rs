//! The zip archives that `torch.save` writes: stored members only, every offset checked.

use std::collections::HashMap;

/// A member's name and the place of its bytes.
pub(super) type Members = HashMap<String, (u64, u64)>;

const END: &[u8; 4] = b"PK\x05\x06";
const END_64: &[u8; 4] = b"PK\x06\x06";
const LOCATOR_64: &[u8; 4] = b"PK\x06\x07";
const CENTRAL: &[u8; 4] = b"PK\x01\x02";
const LOCAL: &[u8; 4] = b"PK\x03\x04";

/// Reads the central directory. The local header of each member must agree with it: archives whose two lists
/// differ show one thing to a scanner and another to a loader.
pub(super) fn members(file: &[u8]) -> Result<Members, String> {
    let (start, size, count) = directory(file)?;
    let end = start.checked_add(size).filter(|&end| end <= file.len() as u64);
    let end = end.ok_or("the central directory lies outside the file")?;
    let mut rest = &file[start as usize..end as usize];
    let mut members = Members::new();
    let mut ranges = Vec::new();
    while !rest.is_empty() {
        let header = rest.get(..46).filter(|header| header.starts_with(CENTRAL));
        let header = header.ok_or("the central directory is damaged")?;
        let (flags, method) = (u16_at(header, 8), u16_at(header, 10));
        let lengths = [28, 30, 32].map(|at| usize::from(u16_at(header, at)));
        let variable = rest.get(46..46 + lengths.iter().sum::<usize>());
        let variable = variable.ok_or("the central directory is damaged")?;
        let (name, extra) = variable[..lengths[0] + lengths[1]].split_at(lengths[0]);
        rest = &rest[46 + variable.len()..];
        let name = std::str::from_utf8(name).map_err(|_| "a member's name is not UTF-8")?;
        check_name(name)?;
        if flags & 1 != 0 {
            return Err(format!("member `{name}` is encrypted"));
        }
        if method != 0 {
            return Err(format!("member `{name}` is compressed; torch stores members as they are"));
        }
        let sizes = [24, 20, 42].map(|at| u32_at(header, at));
        let [full, packed, local] =
            wide(sizes, extra).ok_or_else(|| format!("member `{name}` lacks its 64-bit sizes"))?;
        if full != packed {
            return Err(format!("member `{name}` has two different sizes"));
        }
        let data = local_data(file, local, name)?;
        let stop = data.checked_add(full).filter(|&stop| stop <= start);
        let stop = stop.ok_or_else(|| format!("member `{name}` reaches beyond the file's data"))?;
        ranges.push((local, stop, name));
        if members.insert(name.to_owned(), (data, full)).is_some() {
            return Err(format!("member `{name}` occurs twice"));
        }
    }
    if members.len() as u64 != count {
        return Err(format!("{} members where {count} are announced", members.len()));
    }
    ranges.sort_unstable();
    match ranges.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        Some(pair) => Err(format!("members `{}` and `{}` overlap", pair[0].2, pair[1].2)),
        None => Ok(members),
    }
}

/// Offset, size and count of the central directory.
fn directory(file: &[u8]) -> Result<(u64, u64, u64), String> {
    let missing = "no end of archive; the file is truncated, download it again";
    // The end record is the last 22 bytes unless a comment of up to 64 KiB follows.
    let tail = file.len().saturating_sub(22 + 0xffff);
    let at = (tail..(file.len() + 1).saturating_sub(22))
        .rev()
        .find(|&at| {
            file[at..].starts_with(END)
                && at + 22 + usize::from(u16_at(file, at + 20)) == file.len()
        })
        .ok_or(missing)?;
    let count = u64::from(u16_at(file, at + 10));
    let (size, start) = (u64::from(u32_at(file, at + 12)), u64::from(u32_at(file, at + 16)));
    let overflowed = count == 0xffff || size == 0xffff_ffff || start == 0xffff_ffff;
    let locator = at.checked_sub(20).filter(|&at| file[at..].starts_with(LOCATOR_64));
    let Some(locator) = locator.filter(|_| overflowed) else { return Ok((start, size, count)) };
    let record = usize::try_from(u64_at(file, locator + 8))
        .ok()
        .and_then(|at| file.get(at..at.checked_add(56)?))
        .filter(|record| record.starts_with(END_64))
        .ok_or("the 64-bit end of archive is damaged")?;
    Ok((u64_at(record, 48), u64_at(record, 40), u64_at(record, 32)))
}

/// Replaces the sizes that do not fit 32 bits by those of the zip64 field, in its fixed order.
fn wide(sizes: [u32; 3], mut extra: &[u8]) -> Option<[u64; 3]> {
    if !sizes.contains(&u32::MAX) {
        return Some(sizes.map(u64::from));
    }
    let mut field = loop {
        let (id, len) = (u16_at(extra.get(..4)?, 0), usize::from(u16_at(extra, 2)));
        let body = extra.get(4..4 + len)?;
        if id == 1 {
            break body;
        }
        extra = &extra[4 + len..];
    };
    let mut wide = sizes.map(u64::from);
    for size in &mut wide {
        if *size == u64::from(u32::MAX) {
            *size = u64_at(field.get(..8)?, 0);
            field = &field[8..];
        }
    }
    Some(wide)
}

/// First data byte of the member whose local header is at `local`.
fn local_data(file: &[u8], local: u64, name: &str) -> Result<u64, String> {
    let damaged = || format!("the local header of member `{name}` is damaged");
    let at = usize::try_from(local).map_err(|_| damaged())?;
    let header = at.checked_add(30).and_then(|end| file.get(at..end)).ok_or_else(damaged)?;
    let (name_len, extra_len) = (usize::from(u16_at(header, 26)), usize::from(u16_at(header, 28)));
    let stored = file.get(at + 30..at + 30 + name_len).ok_or_else(damaged)?;
    if !header.starts_with(LOCAL) || u16_at(header, 8) != 0 {
        return Err(damaged());
    }
    if stored != name.as_bytes() {
        return Err(format!("member `{name}` has another name in its local header"));
    }
    Ok((at + 30 + name_len + extra_len) as u64)
}

fn check_name(name: &str) -> Result<(), String> {
    let traversal = name.split('/').any(|part| part == "..") || name.starts_with('/');
    if name.is_empty() || traversal || name.contains(['\\', '\0']) || name.contains(':') {
        let shown: String = name.chars().take(80).collect();
        return Err(format!("member name `{}` leads outside", shown.escape_debug()));
    }
    Ok(())
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}
