//! Forty harmless files and more than sixty hostile ones, all built here from bytes and none ever run.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use refit_store::scan::{Severity, scan};

/// Pickle pieces, spelled as opcodes.
mod op {
    pub fn global(module: &str, name: &str) -> Vec<u8> {
        format!("c{module}\n{name}\n").into_bytes()
    }
    pub fn short(text: &str) -> Vec<u8> {
        [&[0x8c, text.len() as u8], text.as_bytes()].concat()
    }
    pub fn stack_global(module: &str, name: &str) -> Vec<u8> {
        [short(module), short(name), vec![0x93]].concat()
    }
    pub fn unicode(text: &str) -> Vec<u8> {
        [b"X".as_slice(), &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
    }
    pub fn int(value: u8) -> Vec<u8> {
        vec![b'K', value]
    }
    /// `protocol parts... STOP`.
    pub fn pickle(parts: &[Vec<u8>]) -> Vec<u8> {
        [&[0x80, 4], parts.concat().as_slice(), b"."].concat()
    }
    /// `callable("id")`.
    pub fn call(callable: Vec<u8>) -> Vec<Vec<u8>> {
        vec![callable, short("id"), vec![0x85], b"R".to_vec()]
    }
}

struct Member<'a> {
    name: &'a str,
    local_name: Option<&'a str>,
    data: Vec<u8>,
    flags: u16,
    method: u16,
    wrong_crc: bool,
    /// Size and checksum before compression.
    unpacked: Option<(u32, u32)>,
}

fn member(name: &str, data: impl Into<Vec<u8>>) -> Member<'_> {
    Member {
        name,
        local_name: None,
        data: data.into(),
        flags: 0,
        method: 0,
        wrong_crc: false,
        unpacked: None,
    }
}

fn deflated<'a>(name: &'a str, data: &[u8]) -> Member<'a> {
    use std::io::Write;
    let mut encoder =
        flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(data).unwrap();
    let mut crc = flate2::Crc::new();
    crc.update(data);
    let unpacked = Some((data.len() as u32, crc.sum()));
    Member { method: 8, unpacked, ..member(name, encoder.finish().unwrap()) }
}

fn zip(members: &[Member<'_>]) -> Vec<u8> {
    let (mut out, mut directory) = (Vec::new(), Vec::new());
    for m in members {
        let mut crc = flate2::Crc::new();
        crc.update(&m.data);
        let (size, sum) = m.unpacked.unwrap_or((m.data.len() as u32, crc.sum()));
        let sum = sum ^ u32::from(m.wrong_crc);
        let shared = |name: &str| {
            let mut bytes = Vec::new();
            for short in [20u16, m.flags, m.method, 0, 0] {
                bytes.extend(short.to_le_bytes());
            }
            for word in [sum, m.data.len() as u32, size] {
                bytes.extend(word.to_le_bytes());
            }
            bytes.extend((name.len() as u16).to_le_bytes());
            bytes.extend([0, 0]);
            bytes
        };
        directory.extend(b"PK\x01\x02\x14\x00");
        directory.extend(shared(m.name));
        directory.extend([0; 10]);
        directory.extend((out.len() as u32).to_le_bytes());
        directory.extend(m.name.as_bytes());
        let local = m.local_name.unwrap_or(m.name);
        out.extend(b"PK\x03\x04");
        out.extend(shared(local));
        out.extend(local.as_bytes());
        out.extend(&m.data);
    }
    let at = out.len() as u32;
    out.extend(&directory);
    out.extend(b"PK\x05\x06\0\0\0\0");
    for count in [members.len() as u16; 2] {
        out.extend(count.to_le_bytes());
    }
    out.extend((directory.len() as u32).to_le_bytes());
    out.extend(at.to_le_bytes());
    out.extend([0, 0]);
    out
}

/// `_rebuild_tensor_v2(storage, 0, (2,), (1,), False, OrderedDict())` as torch writes it.
fn tensor(storage: &str) -> Vec<u8> {
    [
        op::global("torch._utils", "_rebuild_tensor_v2"),
        b"((".to_vec(),
        op::unicode("storage"),
        op::global("torch", storage),
        op::unicode("0"),
        op::unicode("cpu"),
        op::int(2),
        b"tQ".to_vec(),
        [op::int(0), op::int(2), vec![0x85], op::int(1), vec![0x85], vec![0x89]].concat(),
        op::global("collections", "OrderedDict"),
        b")RtR".to_vec(),
    ]
    .concat()
}

fn state(storage: &str) -> Vec<u8> {
    op::pickle(&[
        op::global("collections", "OrderedDict"),
        b")R".to_vec(),
        op::unicode("w"),
        tensor(storage),
        b"s".to_vec(),
    ])
}

fn torch_zip(pickle: Vec<u8>) -> Vec<u8> {
    zip(&torch_members(pickle))
}

fn torch_members(pickle: Vec<u8>) -> Vec<Member<'static>> {
    vec![
        member("archive/data.pkl", pickle),
        member("archive/byteorder", *b"little"),
        member("archive/data/0", [0x80, 2, 0x63, 0x6f, 0x73, 0, 0, 0]),
        member("archive/version", *b"3\n"),
    ]
}

/// torch's format before zip: five pickles, then the storages.
fn legacy(main: Vec<u8>, behind: &[u8]) -> Vec<u8> {
    let magic = [
        &[0x80, 2, 0x8a, 10][..],
        &[0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19],
        b".",
    ]
    .concat();
    let keys = op::pickle(&[b"]".to_vec(), op::unicode("0"), b"a".to_vec()]);
    let storage = [&2u64.to_le_bytes()[..], &[0; 8]].concat();
    [
        magic,
        vec![0x80, 2, b'M', 0xe9, 3, b'.'],
        op::pickle(&[b"}".to_vec()]),
        main,
        keys,
        storage,
        behind.to_vec(),
    ]
    .concat()
}

fn safetensors(header: &str, data: usize) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat()
}

fn gguf(
    template: Option<&str>,
    version: u32,
    tensors: &[(&str, u64, u32, u64)],
    data: usize,
) -> Vec<u8> {
    let text = |s: &str| [&(s.len() as u64).to_le_bytes()[..], s.as_bytes()].concat();
    let mut out = b"GGUF".to_vec();
    out.extend(version.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((1 + u64::from(template.is_some())).to_le_bytes());
    out.extend(text("general.architecture"));
    out.extend(8u32.to_le_bytes());
    out.extend(text("llama"));
    if let Some(template) = template {
        out.extend(text("tokenizer.chat_template"));
        out.extend(8u32.to_le_bytes());
        out.extend(text(template));
    }
    for (name, len, kind, offset) in tensors {
        out.extend(text(name));
        out.extend(1u32.to_le_bytes());
        out.extend(len.to_le_bytes());
        out.extend(kind.to_le_bytes());
        out.extend(offset.to_le_bytes());
    }
    out.resize(out.len().next_multiple_of(32) + data, 0);
    out
}

fn numpy(descr: &str) -> Vec<u8> {
    let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': (2,), }}\n");
    [&b"\x93NUMPY\x01\x00"[..], &(header.len() as u16).to_le_bytes(), header.as_bytes(), &[0; 16]]
        .concat()
}

type Files = Vec<(String, Vec<u8>)>;

const CHAT: &str = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}{% if loop.last and m.role != 'system' %}{{ raise_exception('no') }}{% endif %}{% endfor %}";

fn benign() -> Files {
    let mut files: Files = Vec::new();
    let mut add = |name: &str, bytes: Vec<u8>| files.push((name.to_owned(), bytes));
    for storage in [
        "FloatStorage",
        "HalfStorage",
        "BFloat16Storage",
        "LongStorage",
        "IntStorage",
        "ByteStorage",
    ] {
        add(&format!("{storage}.pth"), torch_zip(state(storage)));
    }
    add("legacy.pth", legacy(state("FloatStorage"), b""));
    add(
        "legacy.bin",
        legacy(
            op::pickle(&[b"}".to_vec(), op::unicode("w"), tensor("FloatStorage"), b"s".to_vec()]),
            b"",
        ),
    );
    add(
        "memo.pkl",
        op::pickle(&[
            op::short("collections"),
            vec![0x94],
            op::short("OrderedDict"),
            vec![0x94, 0x93, 0x94],
            b")R".to_vec(),
        ]),
    );
    add(
        "numbers.pkl",
        op::pickle(&[
            b"]".to_vec(),
            b"(".to_vec(),
            op::int(1),
            vec![b'G', 0, 0, 0, 0, 0, 0, 0, 0],
            vec![0x8a, 1, 0xff],
            b"NN\x88\x89".to_vec(),
            b"e".to_vec(),
        ]),
    );
    add("framed.pkl", op::pickle(&[vec![0x95, 5, 0, 0, 0, 0, 0, 0, 0], op::short("abc")]));
    add("dict.pkl", op::pickle(&[b"}(".to_vec(), op::unicode("a"), op::int(1), b"u".to_vec()]));
    add("bytes.pkl", op::pickle(&[b"C\x03abc".to_vec()]));
    add("protocol0.pkl", b"(dp0\nVlr\np1\nF0.5\ns.".to_vec());
    add(
        "size.pkl",
        op::pickle(&[op::global("torch", "Size"), b"(".to_vec(), op::int(2), b"t\x85R".to_vec()]),
    );
    add(
        "scalar.pkl",
        op::pickle(&[
            op::global("numpy", "dtype"),
            op::short("f8"),
            vec![0x89, 0x88, 0x87],
            b"R".to_vec(),
        ]),
    );
    add(
        "parameter.pth",
        torch_zip(op::pickle(&[
            op::global("torch._utils", "_rebuild_parameter"),
            tensor("FloatStorage"),
            vec![0x88],
            op::global("collections", "OrderedDict"),
            b")R\x87R".to_vec(),
        ])),
    );
    let one = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    add("one.safetensors", safetensors(one, 8));
    add("padded.safetensors", safetensors(&format!("{one}   "), 8));
    add(
        "meta.safetensors",
        safetensors(
            r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}"#,
            8,
        ),
    );
    add(
        "two.safetensors",
        safetensors(
            r#"{"b":{"dtype":"I8","shape":[4],"data_offsets":[4,8]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#,
            8,
        ),
    );
    add(
        "empty.safetensors",
        safetensors(r#"{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#, 0),
    );
    add(
        "scalar.safetensors",
        safetensors(r#"{"a":{"dtype":"F64","shape":[],"data_offsets":[0,8]}}"#, 8),
    );
    add("a.gguf", gguf(None, 3, &[("w", 32, 0, 0)], 128));
    add("v2.gguf", gguf(None, 2, &[("w", 32, 2, 0)], 32));
    add("two.gguf", gguf(None, 3, &[("w", 32, 0, 0), ("v", 32, 8, 128)], 192));
    add("chat.gguf", gguf(Some(CHAT), 3, &[("w", 32, 0, 0)], 128));
    add("array.npy", numpy("<f4"));
    add("array.npz", zip(&[member("x.npy", numpy("<i8"))]));
    add("config.json", br#"{"model_type":"llama","hidden_size":8}"#.to_vec());
    add(
        "tokenizer_config.json",
        serde_json::to_vec(&serde_json::json!({"chat_template": CHAT, "auto_map": {}})).unwrap(),
    );
    add("template.jinja", CHAT.as_bytes().to_vec());
    add("README.md", b"# A model\n\nRun `import os` at home.\n".to_vec());
    add("vocab.txt", b"[PAD]\nc\nos\n".to_vec());
    add("merges.txt", b"#version: 0.2\ni n\n".to_vec());
    add("notes.yaml", b"a: 1\nb: [x]\n".to_vec());
    add("images.idx", [0, 0, 8, 3, 0, 0, 0, 1].to_vec());
    add("words.dat", b"cat n 01\n".to_vec());
    add("code_list.json", br#"["__init__", "eval("]"#.to_vec());
    files
}

fn malicious() -> Files {
    let mut files: Files = Vec::new();
    let mut add = |name: &str, bytes: Vec<u8>| files.push((name.to_owned(), bytes));
    // Call targets, in denylists or not.
    for (module, name) in [
        ("os", "system"),
        ("posix", "system"),
        ("nt", "system"),
        ("subprocess", "Popen"),
        ("builtins", "eval"),
        ("builtins", "exec"),
        ("__builtin__", "eval"),
        ("builtins", "getattr"),
        ("operator", "attrgetter"),
        ("functools", "partial"),
        ("runpy", "_run_code"),
        ("pip", "main"),
        ("asyncio", "run"),
        ("webbrowser", "open"),
        ("shutil", "rmtree"),
        ("ctypes", "CDLL"),
        ("pty", "spawn"),
        ("bdb", "Bdb.run"),
        ("timeit", "timeit"),
        ("cProfile", "run"),
        ("idlelib.pyshell", "ModifiedInterpreter"),
        ("torch", "load"),
        ("torch.storage", "_load_from_bytes"),
        ("torch.hub", "load"),
        ("torch.jit", "load"),
        ("numpy", "load"),
        ("pickle", "loads"),
        ("importlib", "import_module"),
        ("types", "FunctionType"),
        ("marshal", "loads"),
        ("numpy.testing._private.utils", "runstring"),
        ("lib2to3.pgen2.grammar", "Grammar.loads"),
        ("code", "InteractiveInterpreter"),
        ("socket", "create_connection"),
        ("torch._inductor.codecache", "compile_file"),
    ] {
        add(&format!("{module}.{name}.pkl"), op::pickle(&op::call(op::global(module, name))));
    }
    add("stack.pth", torch_zip(op::pickle(&op::call(op::stack_global("os", "system")))));
    // Names through the memo, by every opcode that reads it.
    add(
        "memo.pkl",
        op::pickle(&[
            op::short("os"),
            vec![0x94],
            op::short("system"),
            vec![0x94],
            b"00h\0h\x01\x93".to_vec(),
            op::short("id"),
            b"\x85R".to_vec(),
        ]),
    );
    add(
        "longmemo.pkl",
        op::pickle(&[
            op::short("system"),
            b"r\x09\0\0\0".to_vec(),
            b"0".to_vec(),
            op::short("os"),
            b"j\x09\0\0\0\x93)R".to_vec(),
        ]),
    );
    add(
        "swapped.pkl",
        op::pickle(&[
            op::short("OrderedDict"),
            b"q\0".to_vec(),
            b"0".to_vec(),
            op::short("system"),
            b"q\0".to_vec(),
            b"0".to_vec(),
            op::short("os"),
            b"h\0\x93)R".to_vec(),
        ]),
    );
    add("computed.pkl", op::pickle(&[b"]".to_vec(), op::short("system"), b"\x93)R".to_vec()]));
    add("escaped.pkl", b"V\\u006fs\nVsystem\n\x93(Vid\ntR.".to_vec());
    // Other ways to call or to change what is called.
    add("inst.pkl", b"(Vid\nios\nsystem\n.".to_vec());
    add(
        "obj.pkl",
        op::pickle(&[b"(".to_vec(), op::global("os", "system"), op::short("id"), b"o".to_vec()]),
    );
    add(
        "obj_allowed.pkl",
        op::pickle(&[b"(".to_vec(), op::global("collections", "OrderedDict"), b"o".to_vec()]),
    );
    add(
        "newobj.pkl",
        op::pickle(&[op::global("subprocess", "Popen"), op::short("id"), b"\x85\x81".to_vec()]),
    );
    add(
        "newobj_ex.pkl",
        op::pickle(&[op::global("collections", "OrderedDict"), b")}\x92".to_vec()]),
    );
    add("ext.pkl", op::pickle(&[vec![0x82, 1], b")R".to_vec()]));
    add("persid.pkl", b"\x80\x02Pos.system\n.".to_vec());
    add("persistent.pkl", op::pickle(&[op::short("anything"), b"Q".to_vec()]));
    add("build.pkl", op::pickle(&[op::global("collections", "OrderedDict"), b"}b".to_vec()]));
    add("value_called.pkl", op::pickle(&[op::global("torch", "FloatStorage"), b")R".to_vec()]));
    add("buffer.pkl", op::pickle(&[vec![0x97]]));
    add(
        "result_called.pkl",
        op::pickle(&[op::global("collections", "OrderedDict"), b")R)R".to_vec()]),
    );
    // Hidden places.
    let evil = op::pickle(&op::call(op::global("os", "system")));
    add("behind.pkl", [op::pickle(&[b"N".to_vec()]), evil.clone()].concat());
    add("behind.pth", torch_zip([state("FloatStorage"), evil.clone()].concat()));
    add("behind_legacy.pth", legacy(state("FloatStorage"), &evil));
    add("in_legacy.pth", legacy(evil.clone(), b""));
    add("extension.txt", evil.clone());
    add("weights.dat", evil.clone());
    add("model.safetensors", evil.clone());
    add("text_protocol.md", b"cos\nsystem\n(S'id'\ntR.".to_vec());
    add("nested.pth", {
        let mut m = torch_members(state("FloatStorage"));
        m.push(member("archive/extra.pkl", evil.clone()));
        zip(&m)
    });
    add("nested_zip.pth", {
        let mut m = torch_members(state("FloatStorage"));
        m.push(member("archive/inner.bin", torch_zip(evil.clone())));
        zip(&m)
    });
    add("script.pt", {
        let mut m = torch_members(state("FloatStorage"));
        m.push(member("archive/code/__torch__.py", *b"import os"));
        zip(&m)
    });
    add("gzip.pth", b"\x1f\x8b\x08\0\0\0\0\0".to_vec());
    // Zip tricks.
    add("encrypted.pth", {
        let mut m = torch_members(evil.clone());
        m[0].flags = 1;
        zip(&m)
    });
    add("duplicate.pth", {
        let mut m = torch_members(state("FloatStorage"));
        m.push(member("archive/data.pkl", evil.clone()));
        zip(&m)
    });
    add("two_names.pth", {
        let mut m = torch_members(evil.clone());
        m[0].name = "archive/version2";
        m[0].local_name = Some("archive/data.pkl");
        zip(&m)
    });
    add("method.pth", {
        let mut m = torch_members(evil.clone());
        m[0].method = 12;
        zip(&m)
    });
    add("checksum.pth", {
        let mut m = torch_members(state("FloatStorage"));
        m[2].wrong_crc = true;
        zip(&m)
    });
    add("bomb.pth", {
        // A storage of four megabytes of zeros, and a pickle, both shrunk to almost nothing.
        let mut m = torch_members(state("FloatStorage"));
        m[2] = deflated("archive/data/0", &vec![0; 4 << 20]);
        zip(&m)
    });
    add("bomb_pickle.pth", {
        let mut m = torch_members(state("FloatStorage"));
        m[0] = deflated("archive/data.pkl", &vec![b'N'; 8 << 20]);
        zip(&m)
    });
    add("climbs.pth", {
        let mut m = torch_members(state("FloatStorage"));
        m.push(member("../../.bashrc", *b"id"));
        zip(&m)
    });
    add("prepended.bin", [evil.clone(), torch_zip(state("FloatStorage"))].concat());
    add("appended.pth", [torch_zip(state("FloatStorage")), evil.clone()].concat());
    add("truncated.pth", {
        let mut z = torch_zip(state("FloatStorage"));
        z.truncate(z.len() - 30);
        z
    });
    add("truncated.pkl", {
        let mut p = state("FloatStorage");
        p.truncate(p.len() - 3);
        p
    });
    add("cut_after_call.pkl", {
        let mut p = evil.clone();
        p.pop();
        p
    });
    add("objects.npy", numpy("|O"));
    add("objects.npz", zip(&[member("x.npy", numpy("|O"))]));
    // Headers.
    add("huge.safetensors", [&u64::MAX.to_le_bytes()[..], b"{}"].concat());
    add(
        "outside.safetensors",
        safetensors(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 4),
    );
    add(
        "overlap.safetensors",
        safetensors(
            r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[4,12]}}"#,
            12,
        ),
    );
    add(
        "hole.safetensors",
        safetensors(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#, 8),
    );
    add(
        "tail.safetensors",
        safetensors(r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#, 64),
    );
    add(
        "twice.safetensors",
        safetensors(
            r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#,
            8,
        ),
    );
    add(
        "meta.safetensors",
        safetensors(
            r##"{"__metadata__":{"x":"#!/bin/sh\nid"},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"##,
            4,
        ),
    );
    add("far.gguf", gguf(None, 3, &[("w", 1 << 40, 0, 0)], 128));
    add("twice.gguf", gguf(None, 3, &[("w", 32, 0, 0), ("w", 32, 0, 128)], 256));
    add("overlap.gguf", gguf(None, 3, &[("w", 32, 0, 0), ("v", 32, 0, 32)], 256));
    add("version.gguf", gguf(None, 99, &[], 0));
    add(
        "template.gguf",
        gguf(Some("{{ ''.__class__.__mro__[1].__subclasses__() }}"), 3, &[("w", 32, 0, 0)], 128),
    );
    add("joined.gguf", gguf(Some("{{ ''['__cl'+'ass__'] }}"), 3, &[("w", 32, 0, 0)], 128));
    add("attr.jinja", b"{{ x | attr('\\x5f\\x5fclass\\x5f\\x5f') }}".to_vec());
    add(
        "tokenizer_config.json",
        br#"{"chat_template": "{{ cycler.__init__.__globals__.os.popen('id').read() }}"}"#.to_vec(),
    );
    add("hydra.json", br#"{"model": {"_target_": "builtins.exec"}}"#.to_vec());
    add("object.yaml", b"a: !!python/object/apply:os.system [id]\n".to_vec());
    files
}

fn verdict(dir: &Path, name: &str, bytes: &[u8]) -> (bool, String) {
    let path = dir.join(name);
    fs::write(&path, bytes).unwrap();
    let report = scan(&path).unwrap();
    let lines: Vec<_> = report.findings.iter().map(ToString::to_string).collect();
    (report.is_safe(), lines.join("; "))
}

#[test]
fn harmless_files_pass() {
    let dir = tempfile::tempdir().unwrap();
    let files = benign();
    assert!(files.len() >= 38, "{}", files.len());
    let refused: Vec<_> = files
        .iter()
        .filter_map(|(name, bytes)| {
            let (safe, why) = verdict(dir.path(), name, bytes);
            (!safe).then(|| format!("{name}: {why}"))
        })
        .collect();
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

/// What a scan must say of each hostile file: where it is, and the call, opcode, member or header that is to
/// blame. Files named after a callable must name that callable.
const REASONS: &[(&str, &[&str])] = &[
    ("stack.pth", &["!archive/data.pkl at byte 14", "`os.system`"]),
    ("memo.pkl", &["`os.system`"]),
    ("longmemo.pkl", &["`os.system`"]),
    ("swapped.pkl", &["`os.system`"]),
    ("computed.pkl", &["at byte 11", "whose name is computed"]),
    ("escaped.pkl", &["whose name is computed"]),
    ("inst.pkl", &["opcode 0x69 (INST)"]),
    ("obj.pkl", &["`os.system`"]),
    ("obj_allowed.pkl", &["opcode 0x6f (OBJ)"]),
    ("newobj.pkl", &["`subprocess.Popen`"]),
    ("newobj_ex.pkl", &["opcode 0x92 (NEWOBJ_EX)"]),
    ("ext.pkl", &["opcode 0x82 (EXT)"]),
    ("persid.pkl", &["opcode 0x50 (PERSID)"]),
    ("persistent.pkl", &["persistent reference"]),
    ("build.pkl", &["state is set on something that no call made"]),
    ("value_called.pkl", &["`FloatStorage` is called"]),
    ("buffer.pkl", &["opcode 0x97"]),
    ("result_called.pkl", &["whose name cannot be told"]),
    ("behind.pkl", &["at byte 4", "behind the end of the pickle"]),
    ("behind.pth", &["!archive/data.pkl", "behind the end of the pickle"]),
    ("behind_legacy.pth", &["behind the end of the pickle"]),
    ("in_legacy.pth", &["`os.system`"]),
    ("extension.txt", &["`os.system`"]),
    ("weights.dat", &["`os.system`"]),
    ("model.safetensors", &["header length", "outside the file"]),
    ("text_protocol.md", &["`os.system`"]),
    ("nested.pth", &["!archive/extra.pkl", "`os.system`"]),
    ("nested_zip.pth", &["!archive/inner.bin", "inside an archive"]),
    ("script.pt", &["!archive/code/__torch__.py", "TorchScript"]),
    ("gzip.pth", &["gzip"]),
    ("encrypted.pth", &["`archive/data.pkl` is marked as encrypted"]),
    ("duplicate.pth", &["`archive/data.pkl` occurs twice"]),
    ("two_names.pth", &["archive/version2 in the directory and archive/data.pkl before it"]),
    ("method.pth", &["compression method 12"]),
    ("checksum.pth", &["`archive/data/0` has another checksum"]),
    ("bomb.pth", &["!archive/data/0", "zip bomb", "unpack to 4194304"]),
    ("bomb_pickle.pth", &["!archive/data.pkl", "zip bomb"]),
    ("climbs.pth", &["`../../.bashrc` is not a plain relative name"]),
    ("prepended.bin", &["`os.system`"]),
    ("appended.pth", &["data stands behind the archive"]),
    ("truncated.pth", &["cut off"]),
    ("truncated.pkl", &["the stream is cut off"]),
    ("cut_after_call.pkl", &["`os.system`"]),
    ("objects.npy", &["unpickles"]),
    ("objects.npz", &["!x.npy", "unpickles"]),
    ("huge.safetensors", &["header length 18446744073709551615"]),
    ("outside.safetensors", &["tensor `a`: bytes 0..8 lie outside the 4 bytes"]),
    ("overlap.safetensors", &["overlap at byte 4"]),
    ("hole.safetensors", &["a hole where something can hide at byte 0"]),
    ("tail.safetensors", &["60 bytes behind the last tensor"]),
    ("twice.safetensors", &["tensor `a` occurs twice"]),
    ("meta.safetensors", &["metadata `x` begins like code"]),
    ("far.gguf", &["tensors take 4398046511104 bytes, but 128"]),
    ("twice.gguf", &["tensor `w` occurs twice"]),
    ("overlap.gguf", &["`w` and `v` overlap"]),
    ("version.gguf", &["version 99"]),
    ("template.gguf", &["`tokenizer.chat_template` uses `__class__`"]),
    ("joined.gguf", &["`tokenizer.chat_template` uses `__class__`"]),
    ("attr.jinja", &["uses `\\x5f`"]),
    ("tokenizer_config.json", &["`chat_template` uses `__globals__`"]),
    ("hydra.json", &["`_target_`"]),
    ("object.yaml", &["YAML tag that runs Python"]),
];

#[test]
fn hostile_files_are_refused_every_one_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    let files = malicious();
    assert!(files.len() >= 60, "{}", files.len());
    for (name, bytes) in files {
        let (safe, why) = verdict(dir.path(), &name, &bytes);
        assert!(!safe, "{name} passes: {why}");
        assert!(why.contains(&name), "{name} is not named: {why}");
        match REASONS.iter().find(|(file, _)| *file == name) {
            Some((_, parts)) => {
                for part in *parts {
                    assert!(why.contains(part), "{name}: `{part}` is not in: {why}");
                }
            }
            None => {
                let callable = name.strip_suffix(".pkl").unwrap();
                let named = format!("at byte 2: `{callable}` is not among the callables");
                assert!(why.contains(&named), "{name}: {why}");
            }
        }
    }
}

#[test]
fn every_opcode_outside_the_list_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let known = b"\x80\x95.(012N\x88\x89JKMILFG\x8aXT\x8cU\x8dVSBC\x8e\x96)t\x85\x86\x87]lae}\x8fd\x91su\x90pqr\x94ghjc\x93R\x81bQ";
    for opcode in (0..=255u8).filter(|opcode| !known.contains(opcode)) {
        let (safe, why) =
            verdict(dir.path(), "x.pkl", &[&[0x80, 4, opcode], &[0; 64][..]].concat());
        assert!(!safe && why.contains(&format!("opcode 0x{opcode:02x}")), "0x{opcode:02x}: {why}");
    }
}

#[test]
fn a_directory_is_scanned_whole() {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("sub")).unwrap();
    fs::write(dir.path().join("config.json"), br#"{"auto_map": {"AutoModel": "modeling.Evil"}}"#)
        .unwrap();
    fs::write(dir.path().join("modeling.py"), "import os").unwrap();
    let report = scan(dir.path()).unwrap();
    assert_eq!((report.files, report.worst()), (2, Some(Severity::Warning)));
    assert!(report.is_safe() && report.findings.len() == 2);
    let reasons: Vec<_> = report.findings.iter().map(ToString::to_string).collect();
    assert!(reasons[0].starts_with("config.json: `auto_map` names Python classes"), "{reasons:?}");
    assert!(reasons[1].starts_with("modeling.py: code; refit never runs it"), "{reasons:?}");
    fs::write(dir.path().join("config.json"), br#"{"trust_remote_code": true}"#).unwrap();
    let reasons = scan(dir.path()).unwrap().findings;
    assert!(reasons[0].to_string().starts_with("config.json: `trust_remote_code`"), "{reasons:?}");
    fs::write(
        dir.path().join("sub/weights.txt"),
        op::pickle(&op::call(op::global("os", "system"))),
    )
    .unwrap();
    let report = scan(dir.path()).unwrap();
    assert!(!report.is_safe());
    assert_eq!(report.findings[0].file, "sub/weights.txt");
    assert!(report.findings[0].what.contains("os.system"));
}

#[test]
fn what_only_the_whole_model_shows_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let one = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    fs::write(dir.path().join("one.safetensors"), safetensors(one, 8)).unwrap();
    fs::write(dir.path().join("config.json"), br#"{"model_type":"llama","num_hidden_layers":1}"#)
        .unwrap();
    let lines = || -> Vec<String> {
        let report = scan(dir.path()).unwrap();
        report.findings.iter().map(|f| format!("{:?} {f}", f.severity)).collect()
    };
    let found = lines();
    assert!(
        found[0].contains("Note")
            && found[0].contains("tensors missing (`model.embed_tokens.weight`")
    );
    assert!(
        found[1].contains("not part of the architecture that config.json names: 1 tensor (`a`)"),
        "{found:?}"
    );
    let index = dir.path().join("model.safetensors.index.json");
    fs::write(&index, r#"{"weight_map":{"a":"../one.safetensors"}}"#).unwrap();
    let found = lines();
    assert!(
        found[0].starts_with("Danger model.safetensors.index.json: shard `../one.safetensors`"),
        "{found:?}"
    );
    fs::write(&index, r#"{"weight_map":{"a":"gone.safetensors"}}"#).unwrap();
    let found = lines();
    assert!(found[0].starts_with("Warning") && found[0].contains("gone.safetensors"), "{found:?}");
}

#[cfg(unix)]
#[test]
fn links_out_of_the_directory_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("vocab.txt"), "a").unwrap();
    std::os::unix::fs::symlink("vocab.txt", model.join("inside.txt")).unwrap();
    assert!(scan(&model).unwrap().is_safe());
    fs::write(dir.path().join("secret"), "x").unwrap();
    std::os::unix::fs::symlink("../secret", model.join("outside.txt")).unwrap();
    assert!(!scan(&model).unwrap().is_safe());
}

#[test]
fn what_is_not_there_is_an_error() {
    assert!(scan(Path::new("no/such/file")).unwrap_err().to_string().contains("no/such/file"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), kind in 0usize..6) {
        let dir = tempfile::tempdir().unwrap();
        let heads: [&[u8]; 6] = [b"", b"PK\x03\x04", b"GGUF\x03\0\0\0", b"\x80\x02", b"\x20\0\0\0\0\0\0\0{", b"\x93NUMPY"];
        verdict(dir.path(), ["x", "x.pth", "x.gguf", "x.pkl", "x.safetensors", "x.npy"][kind], &[heads[kind], &bytes].concat());
    }

    /// One changed byte in a sound file never makes the scan fail other than by a finding.
    #[test]
    fn mutations_are_survived(at in 0usize..2000, bit in 0u8..8, which in 0usize..40) {
        let dir = tempfile::tempdir().unwrap();
        let files = benign();
        let (name, bytes) = &files[which % files.len()];
        let mut bytes = bytes.clone();
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        verdict(dir.path(), name, &bytes);
    }
}
