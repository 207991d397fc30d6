use std::cell::RefCell;

use super::*;

const WIDTH: usize = 3;

fn keys(n: usize) -> Vec<Key> {
    (0..n).map(|i| key(&[&i.to_le_bytes()])).collect()
}

fn batches(n: usize, size: usize) -> Vec<Vec<usize>> {
    (0..n).collect::<Vec<_>>().chunks(size).map(<[usize]>::to_vec).collect()
}

/// What a model would say of example `i`.
fn row(i: usize) -> [f32; WIDTH] {
    [i as f32, -(i as f32) / 3.0, f32::from_bits(0x3f80_0001 + i as u32)]
}

fn open(root: &Path, limits: Limits) -> FeatureStore {
    FeatureStore::open(root, &["model", "recipe"], WIDTH, limits).unwrap()
}

/// Asks for `n` features, batches of 4; returns them and the examples that were computed.
fn ask(store: &mut FeatureStore, n: usize) -> (Vec<f32>, Vec<usize>) {
    let seen = RefCell::new(Vec::new());
    let mut compute = |batch: &[usize]| -> Result<Vec<f32>> {
        seen.borrow_mut().extend(batch);
        Ok(batch.iter().flat_map(|&i| row(i)).collect())
    };
    let rows = store.rows(&keys(n), &batches(n, 4), &mut compute, &|_, _| {}).unwrap();
    (rows, seen.into_inner())
}

fn wanted(n: usize) -> Vec<f32> {
    (0..n).flat_map(row).collect()
}

fn segments(root: &Path) -> Vec<PathBuf> {
    let sets = fs::read_dir(root).unwrap().map(|set| set.unwrap().path());
    sets.flat_map(|set| segment::list(&set).unwrap()).collect()
}

#[test]
fn what_was_computed_once_is_found_to_the_bit() {
    let root = tempfile::tempdir().unwrap();
    let mut store = open(root.path(), Limits::default());
    let (rows, computed) = ask(&mut store, 10);
    assert_eq!((rows, computed.len()), (wanted(10), 10));
    assert_eq!((store.computed, store.found), (10, 0));
    let mut again = open(root.path(), Limits::default());
    let (rows, computed) = ask(&mut again, 10);
    assert_eq!((rows, computed.len(), again.found), (wanted(10), 0, 10));
    // More examples: only batches with new ones are computed, and those whole.
    let (rows, computed) = ask(&mut again, 14);
    assert_eq!((rows, computed), (wanted(14), (8..14).collect()));
    // Another model, recipe or width has a set of its own.
    for source in [["other", "recipe"], ["model", "other"], ["modelr", "ecipe"]] {
        let other = FeatureStore::open(root.path(), &source, WIDTH, Limits::default()).unwrap();
        assert!(other.is_empty(), "{source:?}");
    }
}

#[test]
fn damaged_segments_are_computed_again() {
    let root = tempfile::tempdir().unwrap();
    ask(&mut open(root.path(), Limits::default()), 8);
    let path = segments(root.path()).remove(0);
    let whole = fs::read(&path).unwrap();
    let flipped = |at: usize| {
        let mut bytes = whole.clone();
        bytes[at] ^= 1;
        bytes
    };
    let longer = [&whole[..], &[0]].concat();
    let values = 16 + 8 * 32 + 5;
    let cases = [whole[..7].to_vec(), whole[..whole.len() - 1].to_vec(), Vec::new(), longer];
    for damaged in cases.into_iter().chain([0, 9, 13, 20, values, whole.len() - 1].map(flipped)) {
        fs::write(&path, &damaged).unwrap();
        let mut store = open(root.path(), Limits::default());
        assert!(store.is_empty(), "{} bytes", damaged.len());
        let (rows, computed) = ask(&mut store, 8);
        assert_eq!((rows, computed.len()), (wanted(8), 8));
        assert_eq!(fs::read(&path).unwrap(), whole, "written again under the same name");
    }
}

#[test]
fn a_run_that_stops_leaves_what_it_computed() {
    let root = tempfile::tempdir().unwrap();
    let limits = Limits { rows: 4, ..Limits::default() };
    let failing = |batch: &[usize]| -> Result<Vec<f32>> {
        match batch.contains(&9) {
            true => Err(Error::EmptyText { what: "example 9".into() }),
            false => Ok(batch.iter().flat_map(|&i| row(i)).collect()),
        }
    };
    let mut store = open(root.path(), limits);
    let asked = store.rows(&keys(16), &batches(16, 4), &mut { failing }, &|_, _| {});
    assert!(matches!(asked, Err(Error::EmptyText { .. })));
    drop(store);
    let (rows, computed) = ask(&mut open(root.path(), limits), 16);
    assert_eq!((rows, computed), (wanted(16), (8..16).collect()));
    // A panic, too: here before any segment was due.
    let root = tempfile::tempdir().unwrap();
    let panics = std::panic::catch_unwind(|| {
        let mut store = open(root.path(), Limits::default());
        let mut compute = |batch: &[usize]| -> Result<Vec<f32>> {
            assert!(!batch.contains(&5), "stopped here");
            Ok(batch.iter().flat_map(|&i| row(i)).collect())
        };
        store.rows(&keys(8), &batches(8, 4), &mut compute, &|_, _| {}).map(drop)
    });
    assert!(panics.is_err());
    assert_eq!(open(root.path(), Limits::default()).len(), 4);
}

#[test]
fn many_segments_become_one() {
    let root = tempfile::tempdir().unwrap();
    let limits = Limits { rows: 1, segments: 3, ..Limits::default() };
    let mut store = open(root.path(), limits);
    let (rows, _) = ask(&mut store, 20);
    assert_eq!((rows, segments(root.path()).len()), (wanted(20), 1));
    let (rows, computed) = ask(&mut store, 20);
    assert_eq!((rows, computed.len()), (wanted(20), 0));
    // A reader that opened the set before still reads its own segments.
    let mut early = open(root.path(), limits);
    segments(root.path()).iter().for_each(|path| fs::remove_file(path).unwrap());
    assert_eq!(ask(&mut early, 20).1, Vec::<usize>::new());
}

#[test]
fn processes_that_share_a_set_do_not_disturb_each_other() {
    let root = tempfile::tempdir().unwrap();
    let limits = Limits { rows: 1, segments: 2, ..Limits::default() };
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for n in [5, 12, 23, 40] {
                    assert_eq!(ask(&mut open(root.path(), limits), n).0, wanted(n));
                }
            });
        }
    });
    let mut store = open(root.path(), limits);
    let (rows, computed) = ask(&mut store, 40);
    assert_eq!((rows, computed.len()), (wanted(40), 0));
    let names = fs::read_dir(&store.dir).unwrap();
    let left = names.filter(|e| e.as_ref().unwrap().path().extension() == Some("tmp".as_ref()));
    assert_eq!(left.count(), 0);
}

#[test]
fn the_oldest_set_goes_first_and_the_limit_holds() {
    let root = tempfile::tempdir().unwrap();
    let set = |name: &str, bytes: u64| {
        let limits = Limits { bytes, ..Limits::default() };
        let mut store = FeatureStore::open(root.path(), &[name], WIDTH, limits).unwrap();
        ask(&mut store, 10);
        (store.dir.clone(), store.unkept.take())
    };
    let one = segment::size(10, WIDTH);
    let (first, _) = set("first", u64::MAX);
    let (second, _) = set("second", u64::MAX);
    for (dir, age) in [(&first, 20), (&second, 10)] {
        let at = SystemTime::now() - Duration::from_secs(age);
        fs::File::open(dir).unwrap().set_modified(at).unwrap();
    }
    let (third, unkept) = set("third", 2 * one);
    assert!(!first.exists() && second.exists() && third.exists() && unkept.is_none());
    // A set that alone is too large keeps what fits, says so, and the rows are right all the same.
    let (_, unkept) = set("fourth", one - 1);
    assert!(unkept.unwrap().contains("at most"));
    let (fifth, _) = set("fifth", u64::MAX);
    assert_eq!(trim(root.path(), 0, None), one);
    assert!(!fifth.exists());
}

#[test]
fn a_place_that_cannot_be_written_does_not_stop_the_work() {
    let root = tempfile::tempdir().unwrap();
    let mut store = open(root.path(), Limits::default());
    let dir = store.dir.clone();
    fs::remove_dir_all(&dir).unwrap();
    fs::write(&dir, "a file where the set was").unwrap();
    assert_eq!(ask(&mut store, 6).0, wanted(6));
    assert!(store.unkept.is_some());
}
