"""What 00_codecs and 00_files do not show: every layout of pixels, damage of every kind, links, faults between system calls."""
import collections
import errno
import io
import itertools
import json
import os
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import cv2
import numpy as np
import pytest
import torch
from conftest import in_child, in_little_space
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

import medfusion.files as files
from medfusion.codecs import decode_jpeg, decode_png, decode_tiff, format_of, stem_of, suffix_of
from medfusion.files import (absolute_path, append_line, clear_abandoned, list_images, list_pairs, luminance,
                             match_images, plain, read_image, read_json, read_pair, read_pixels, to_depth,
                             to_float, whole_folder, window, write_atomically, write_image, write_json)

tifffile = pytest.importorskip('tifffile')
some = settings(suppress_health_check=list(HealthCheck))    # how many, and which, conftest.py says


def noise(seed=0, shape=(24, 20), dtype=np.uint8):
    return np.random.default_rng(seed).integers(1, np.iinfo(dtype).max, shape).astype(dtype)


def head(side=96):
    "A slice with a black background, a flat bone and a noisy brain, as compressors see them."
    y, x = np.mgrid[:side, :side] / side - 0.5
    brain = 120 + 30 * np.sin(20 * y) + np.random.default_rng(0).normal(0, 6, (side, side))
    return np.where(np.hypot(y, x) < 0.4, brain, np.where(np.hypot(y, x) < 0.46, 240, 0)).astype(np.uint8)


def tree(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*'))


def encoded(image, kind, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind, **options)
    return file.getvalue()


# --- what can be stored comes back -----------------------------------------------------------------------------------

@pytest.mark.parametrize('suffix', ['.png', '.PNG', '.bmp', '.tif', '.TIFF'])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_lossless_formats_give_back_what_was_written(tmp_path, suffix, dtype):
    for shape in (17, 33), (16, 16, 3), (1, 1):
        image, path = noise(1, shape, dtype), tmp_path / f'a{suffix}'
        if dtype == np.uint16 and suffix == '.bmp':
            with pytest.raises(ValueError, match='16 bits to 8'):
                write_image(path, image)
            assert tree(tmp_path) == []
            continue
        write_image(path, image)
        again = read_image(path, color=True, quiet=True)
        assert again.dtype == dtype and np.array_equal(again, image)
        assert read_image(path, quiet=True).shape == shape[:2]
        assert tree(tmp_path) == [path.name]


def test_jpeg(tmp_path):
    image = np.tile(np.arange(64, dtype=np.uint8) * 3, (64, 1))
    write_image(tmp_path / 'a.jpg', image)
    assert np.abs(read_image(tmp_path / 'a.jpg').astype(int) - image).max() <= 4
    assert format_of('a.png', (tmp_path / 'a.jpg').read_bytes()).lossy and not format_of('a.tif').lossy


def test_views_and_byte_orders_are_written(tmp_path):
    image = noise(2, (20, 30, 3))
    for array in (image[:, ::-1], image[:, ::2, 0].T, noise(3, dtype=np.uint16).astype('>u2')):
        write_image(tmp_path / 'a.png', array)
        assert np.array_equal(read_image(tmp_path / 'a.png', color=True), array)
    assert np.array_equal(to_float(noise(3, dtype=np.uint16).astype('>u2')), to_float(noise(3, dtype=np.uint16)))


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGB', 'RGBA'])
@pytest.mark.parametrize('suffix', ['.png', '.tif'])
def test_every_kind_of_grey_file_is_the_same_slice(tmp_path, mode, suffix):
    image = (noise(3) > 127).astype(np.uint8) * 255
    path = tmp_path / f'a{suffix}'
    Image.fromarray(image).convert(mode).save(path)
    assert np.array_equal(read_image(path), image)


def test_transparency(tmp_path):
    picture = Image.fromarray(noise(3)).convert('RGBA')
    picture.putalpha(Image.fromarray(noise(4)))
    picture.save(tmp_path / 'a.png')
    assert np.array_equal(read_image(tmp_path / 'a.png'), noise(3))
    picture.save(tmp_path / 'a.tif')  # greys may have been multiplied by their opacity
    with pytest.raises(ValueError, match='TIFF with transparency'):
        read_image(tmp_path / 'a.tif')


def test_rgb_is_luminance_and_in_rgb_order(tmp_path):
    image = noise(5, (20, 20, 3))
    exact = image @ [0.299, 0.587, 0.114]
    for suffix in ('.png', '.tif', '.bmp'):
        Image.fromarray(image).save(tmp_path / f'a{suffix}')
        assert np.array_equal(read_image(tmp_path / f'a{suffix}', color=True), image)
        assert np.abs(read_image(tmp_path / f'a{suffix}') - exact).max() <= 0.5 + 1e-6
    write_image(tmp_path / 'deep.png', image.astype(np.uint16) * 257)
    assert np.abs(read_image(tmp_path / 'deep.png') - 257 * exact).max() <= 0.5 + 1e-6
    batch = torch.from_numpy(to_float(image)).permute(2, 0, 1)[None]
    assert np.abs(luminance(batch)[0, 0].numpy() - exact / 255).max() < 1e-6  # float32
    assert luminance(batch[:, :1]) is not None and luminance(batch[:, :1]).shape == (1, 1, 20, 20)


# --- TIFF ------------------------------------------------------------------------------------------------------------

LAYOUTS = {'grey': ((37, 53), {'photometric': 'minisblack'}),
           'rgb': ((37, 53, 3), {'photometric': 'rgb', 'planarconfig': 'contig'}),
           'planes': ((3, 37, 53), {'photometric': 'rgb', 'planarconfig': 'separate'}),
           'palette': ((37, 53), {'photometric': 'palette', 'colormap': noise(9, (3, 256), np.uint16)}),
           'white is zero': ((37, 53), {'photometric': 'miniswhite'}),
           'cmyk': ((37, 53, 4), {'photometric': 'separated', 'planarconfig': 'contig'}),
           'lab': ((37, 53, 3), {'photometric': 'cielab', 'planarconfig': 'contig'}),
           'five samples': ((37, 53, 5), {'photometric': 'minisblack', 'planarconfig': 'contig'})}


READ = {'grey': 100, 'rgb': 100, 'planes': 100, 'palette': 10}  # and how many kinds of each, at least


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_of_tiff_is_right_or_refused(tmp_path, layout):
    shape, options = LAYOUTS[layout]
    path, read, refused = tmp_path / 'a.tif', 0, set()
    kinds = itertools.product(['u1', 'u2', 'u4', 'i2', 'f2', 'f4', 'f8'], [('<', False), ('>', True), ('>', False)],
                              [None, 'zlib', 'packbits', 'lzma'], [None, (16, 32)], [None, True])
    for dtype, (order, big), compression, tile, predictor in kinds:
        if layout not in READ and (dtype not in ('u1', 'f4') or tile):
            continue
        values = np.random.default_rng(read).random(shape)
        image = (values if dtype[0] == 'f' else values * min(2 ** (8 * int(dtype[1])) - 1, 30000)).astype(dtype)
        try:
            tifffile.imwrite(path, image, byteorder=order, compression=compression, tile=tile, predictor=predictor,
                             bigtiff=big, rowsperstrip=None if tile else 5, **options)
        except (ValueError, KeyError, NotImplementedError, RuntimeError, TypeError):
            continue  # tifffile has no encoder for this one
        expected = np.moveaxis(tifffile.imread(path), 0, 2) if layout == 'planes' else tifffile.imread(path)
        assert np.array_equal(image, tifffile.imread(path))
        try:
            found = read_pixels(path)
        except ValueError as error:
            assert 'is a TIFF with' in str(error) and str(path) in str(error)
            refused.add(str(error).split('TIFF with ')[1].split(',')[0])
            continue
        if layout == 'palette':
            expected = (options['colormap'] >> 8).T.astype(np.uint8)[expected]
        assert found.dtype == expected.dtype.newbyteorder('=') and np.array_equal(found, expected), (dtype, order, tile)
        read += 1
    assert read >= READ.get(layout, 0) and (layout in READ) == (read > 0)
    assert 'LZMA compression' in refused


def test_a_palette_of_a_tiff_in_eight_bits(tmp_path):
    "Colours count to 65535; those of some programs to 255, of which all became black."
    colours = np.random.default_rng(0).integers(0, 256, (3, 256), np.uint16)
    for scale in (1, 257):
        tifffile.imwrite(tmp_path / 'a.tif', noise(), photometric='palette', colormap=colours * np.uint16(scale))
        assert np.array_equal(read_pixels(tmp_path / 'a.tif'), colours.T[noise()])


@pytest.mark.parametrize('compression, name', [(2, 'CCITT'), (7, 'JPEG'), (50000, 'ZSTD'), (34925, 'LZMA'), (50001, 'WebP'),
                                               (34712, 'JPEG 2000'), (12345, r'unknown \(12345\)')])
def test_a_compression_that_is_not_read_is_named(tmp_path, compression, name):
    data = bytearray(encoded(noise(), 'TIFF'))
    at = data.find(struct.pack('<HHI', 259, 3, 1)) + 8
    data[at:at + 2] = struct.pack('<H', compression)
    (tmp_path / 'a.tif').write_bytes(data)
    with pytest.raises(ValueError, match=rf'a\.tif is a TIFF with {name} compression, which is not supported'):
        read_image(tmp_path / 'a.tif')


@pytest.mark.parametrize('compression', [5, 8, 32946])
def test_predictors_and_lzw_as_libtiff_writes_them(compression):
    for dtype, predictor in ((np.uint8, 1), (np.uint8, 2), (np.uint16, 2), (np.float32, 1), (np.float32, 3)):
        for shape in ((70, 90), (70, 90, 3)):
            image = np.resize(head(), shape).astype(dtype)
            image = image / np.float32(255) if dtype == np.float32 else image
            data = cv2.imencode('.tif', image, [cv2.IMWRITE_TIFF_COMPRESSION, compression,
                                                cv2.IMWRITE_TIFF_PREDICTOR, predictor])[1].tobytes()
            assert np.array_equal(decode_tiff(data), image[..., ::-1] if image.ndim == 3 else image)


def test_lzw_of_every_length():
    for size in (1, 2, 300, 4000, 20000):  # beyond 4096 codes the table begins anew
        for image in (noise(size, (1, size)), np.zeros((1, size), np.uint8), np.resize(head(), (1, size))):
            assert np.array_equal(decode_tiff(encoded(image, 'TIFF', compression='tiff_lzw')), image)


@pytest.mark.parametrize('how', ['opencv', 'pillow', 'imagej', 'volume'])
def test_a_stack_is_refused(tmp_path, how):
    stack = [noise(seed) for seed in range(5)]
    if how == 'opencv':
        cv2.imwritemulti(str(tmp_path / 'a.tif'), stack)
    elif how == 'pillow':
        first, *rest = map(Image.fromarray, stack)
        first.save(tmp_path / 'a.tif', save_all=True, append_images=rest)
    else:
        tifffile.imwrite(tmp_path / 'a.tif', np.stack(stack), photometric='minisblack', imagej=how == 'imagej',
                         volumetric=how == 'volume' or None, tile=(5, 16, 16) if how == 'volume' else None)
    with pytest.raises(ValueError, match=r'a\.tif holds (5|several) pages \(a 3-D stack\)'):
        read_image(tmp_path / 'a.tif')


def test_values_that_are_no_greys(tmp_path):
    for value in (np.nan, np.inf, -0.001, 1.001, -1024):
        image = np.full((20, 20), 0.5, np.float32)
        image[3, 4] = value
        tifffile.imwrite(tmp_path / 'a.tif', image)
        with pytest.raises(ValueError, match=r'a\.tif holds float pixels that are NaN or outside \[0, 1\]'):
            read_image(tmp_path / 'a.tif')
    tifffile.imwrite(tmp_path / 'a.tif', noise(6).astype(np.int16) - 1024)
    with pytest.raises(ValueError, match='int16 pixels; window it'):
        read_image(tmp_path / 'a.tif')
    assert read_image(tmp_path / 'a.tif', value_range=(-1024, -770)).dtype == np.float32


# --- damage ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.bmp', '.tif'])
def test_a_truncated_file_is_refused_wherever_it_stops(tmp_path, suffix, capfd):
    for size in ((40, 40), (40, 40, 3)):
        write_image(tmp_path / f'a{suffix}', noise(7, size))
        whole = (tmp_path / f'a{suffix}').read_bytes()
        for length in [1, 2, 8, 30, *range(60, len(whole), 131), *range(len(whole) - 13, len(whole))]:
            (tmp_path / f'cut{suffix}').write_bytes(whole[:length])
            with pytest.raises(ValueError, match=rf'cut\{suffix} .*(truncated|damaged|not an image).*; .*\.$'):
                read_image(tmp_path / f'cut{suffix}')
    assert capfd.readouterr().err == ''  # decoders' own complaints are not shown


def flipped(data, rng, low, high):
    damaged = bytearray(data)
    damaged[int(rng.integers(low, high))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def missed(data, decode, low, high, trials=100):
    "How many of so many files with one flipped bit are decoded to other pixels without a word."
    rng, right, count = np.random.default_rng(0), decode(data), 0
    for _ in range(trials):
        try:
            count += not np.array_equal(decode(flipped(data, rng, low, high)), right)
        except ValueError:
            pass
    return count


def test_flipped_bits(capfd):
    png = encoded(head(), 'PNG')
    assert missed(png, decode_png, 8, len(png)) == 0
    deflate = encoded(head(), 'TIFF', compression='tiff_adobe_deflate')
    tags = {'low': 8, 'high': 8 + 4000}
    assert missed(deflate, decode_tiff, **tags) == 0
    lzw = encoded(head(), 'TIFF', compression='tiff_lzw')
    assert missed(lzw, decode_tiff, **tags) < 70  # it has no checksum: half of them are another right stream
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('quality', [75, 95])
@pytest.mark.parametrize('progressive', [False, True])
def test_a_jpeg_with_a_tail_of_zeros_or_without_a_tail_is_refused(quality, progressive, capfd):
    for image in (head(), np.stack([head()] * 2 + [head()[::-1]], 2)):
        data = encoded(image, 'JPEG', quality=quality, progressive=progressive)
        assert np.array_equal(decode_jpeg(data), np.asarray(Image.open(io.BytesIO(data))))
        assert np.array_equal(decode_jpeg(data + b'\n# a comment'), decode_jpeg(data))
        for share in np.linspace(0.3, 0.99, 30):
            cut = int(share * len(data))
            with pytest.raises(ValueError, match='truncated|damaged'):
                decode_jpeg(data[:cut] + bytes(len(data) - cut))
            with pytest.raises(ValueError, match='truncated|damaged'):
                decode_jpeg(data[:cut])
        with pytest.raises(ValueError, match='its pixels end too early'):
            decode_jpeg(data[:-200] + data[-2:])
        with pytest.raises(ValueError, match='something is missing among its pixels'):
            decode_jpeg(data[:-2] + bytes(40) + data[-2:])
    assert capfd.readouterr().err == ''


@pytest.mark.parametrize('sides', [(200, 203), (206, 213), (214, 212), (215, 209)])
def test_a_whole_jpeg_of_any_size_is_read(sides):
    pet, flat = np.zeros((*sides, 3), np.uint8), np.full(sides, 128, np.uint8)
    pet[40:160, 40:140] = 180, 90, 45
    spot = flat.copy()
    spot[64:128, 64:128] = 200      # whole blocks: the last scan of a progressive one has nothing to say
    for image in (pet, flat, np.dstack([flat] * 3), spot):
        for options in ({'quality': 95}, {'optimize': True}, {'progressive': True}):
            data = encoded(image, 'JPEG', **options)
            assert np.array_equal(decode_jpeg(data), np.asarray(Image.open(io.BytesIO(data)))), options
            assert np.array_equal(decode_jpeg(data[:-2] + b'\xff' * 3 + data[-2:]), decode_jpeg(data)), 'bytes that fill up before a marker'
    for fault in (lambda data: data[:-60] + data[-2:], lambda data: data[:-60] + b'\xff' * 60 + data[-2:], lambda data: data[:-2] + bytes(40) + data[-2:]):
        with pytest.raises(ValueError, match='is damaged'):
            decode_jpeg(fault(encoded(pet, 'JPEG', quality=95)))


def chunk(kind, content):
    return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))


def small_png(width, height, stream):
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0))
            + chunk(b'IDAT', stream) + chunk(b'IEND', b''))


def bombs():
    "Small files that declare more than anybody has memory for, and a few that declare nothing."
    side = 60000
    tiff = bytearray(encoded(noise(), 'TIFF'))
    for tag in (256, 257):
        at = tiff.find(struct.pack('<HH', tag, 4)) if tiff.find(struct.pack('<HH', tag, 4)) > 0 else tiff.find(
            struct.pack('<HH', tag, 3))
        tiff[at + 2:at + 12] = struct.pack('<HII', 4, 1, side)
    bmp = bytearray(encoded(noise(), 'BMP'))
    bmp[18:26] = struct.pack('<ii', side, side)
    jpeg = bytearray(encoded(noise(), 'JPEG'))
    at = jpeg.find(b'\xff\xc0') + 5
    jpeg[at:at + 4] = struct.pack('>HH', side, side)
    return {'a.png': small_png(side, side, zlib.compress(bytes(10 ** 6))), 'b.bmp': bytes(bmp), 'c.jpg': bytes(jpeg),
            'd.tif': bytes(tiff), 'e.png': small_png(20000, 20000, zlib.compress(bytes(1000)))}


def test_bombs_are_refused_before_memory_is_asked_for(tmp_path):
    for name, data in bombs().items():
        (tmp_path / name).write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            with pytest.raises(ValueError, match=rf'{name} declares \d+×\d+ pixels'):
                read_image(tmp_path / name)


def test_no_memory_is_a_refusal_of_the_file(tmp_path, monkeypatch):
    write_image(tmp_path / 'a.png', noise())
    kind = format_of('a.png')
    monkeypatch.setattr(files, 'format_of', lambda path, data: kind._replace(decode=lambda data: bytearray(1 << 62)))
    with pytest.raises(ValueError, match=r'a\.png does not fit into the memory'):
        read_image(tmp_path / 'a.png')


def test_files_that_hold_no_image(tmp_path):
    (tmp_path / 'empty.png').touch()
    (tmp_path / 'text.png').write_text('CT of the head\n' * 20)
    (tmp_path / 'folder.png').mkdir()
    (tmp_path / 'slice.dcm').write_bytes(bytes(128) + b'DICM')
    (tmp_path / 'loop.png').symlink_to('loop.png')
    (tmp_path / 'gone.png').symlink_to('blobs/aa11')
    for name, error, sentence in (('empty.png', ValueError, 'is empty'), ('text.png', ValueError, 'is not an image'),
                                  ('folder.png', FileNotFoundError, 'no file'), ('none.png', FileNotFoundError, 'no file'),
                                  ('slice.dcm', ValueError, 'does not end in .png'),
                                  ('loop.png', FileNotFoundError, 'is a link to'),
                                  ('gone.png', FileNotFoundError, r'gone\.png is a link to blobs/aa11, which is not there')):
        with pytest.raises(error, match=sentence) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@cache
def small_files():
    "A small slice in every format, and in every compression of a TIFF."
    slim, deep = head(32), head(32).astype(np.uint16) * 99
    return {'png': encoded(slim, 'PNG'), 'jpg': encoded(slim, 'JPEG'), 'bmp': encoded(slim, 'BMP'),
            'tif': encoded(slim, 'TIFF'), '16': encoded(deep, 'TIFF'),
            **{name: encoded(slim, 'TIFF', compression=name) for name in ('tiff_lzw', 'tiff_adobe_deflate', 'packbits')}}


def test_a_directory_beyond_any_file(tmp_path):
    "The place of a BigTIFF's first directory is eight bytes: more than any file, and more than an index can be."
    (tmp_path / 'far.tif').write_bytes(b'MM\0+\0\x08\0\0' + b'\x80' + bytes(40))
    with pytest.raises(ValueError, match='far.tif.*damaged'):
        read_image(tmp_path / 'far.tif')


@some
@given(st.sampled_from(['png', 'jpg', 'bmp', 'tif', '16', 'tiff_lzw', 'tiff_adobe_deflate', 'packbits']), st.data())
def test_whatever_happens_to_a_file_it_is_read_or_refused_in_a_sentence(tmp_path, kind, draw):
    data = bytearray(small_files()[kind])
    for _ in range(draw.draw(st.integers(1, 4))):
        at = draw.draw(st.integers(0, len(data) - 1))
        action, piece = draw.draw(st.sampled_from(['write', 'cut', 'insert', 'drop'])), draw.draw(st.binary(max_size=8))
        if action == 'write':
            data[at:at + len(piece)] = piece
        elif action == 'cut':
            del data[max(at, 1):]
        elif action == 'insert':
            data[at:at] = piece
        else:
            del data[at:at + max(1, min(len(piece), len(data) - 1))]
        data = data or bytearray(b'x')
    path = tmp_path / 'a.tif'
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            image = read_image(path)
        except ValueError as error:
            assert str(error).startswith(str(path)) and str(error).endswith('.')
        else:
            assert image.ndim == 2 and image.dtype in (np.uint8, np.uint16, np.float32) and image.size > 0


@pytest.mark.parametrize('kind', ['tif', '16', 'tiff_lzw', 'tiff_adobe_deflate', 'packbits'])
def test_directories_that_lie(tmp_path, kind):
    whole, path = small_files()[kind], tmp_path / 'a.tif'
    start, = struct.unpack_from('<I', whole, 4)
    number, = struct.unpack_from('<H', whole, start)
    values = [(2, '<H', (1, 3, 4, 7, 12, 16)), (4, '<I', (0, 2, 768, 2 ** 31)), (8, '<I', (0, 1, 2, 3, 5, 64, 5000, 2 ** 32 - 1)),
              (0, '<H', (258, 259, 262, 266, 270, 274, 284, 317, 320, 322, 339, 32997))]
    for entry in range(start + 2, start + 2 + 12 * number, 12):
        for place, form, choice in values:
            for value in choice:
                data = bytearray(whole)
                struct.pack_into(form, data, entry + place, value)
                path.write_bytes(data)
                try:
                    assert read_image(path, quiet=True).size
                except ValueError as error:
                    assert str(error).startswith(str(path)) and str(error).endswith('.')


def test_png_that_lies_with_right_checksums(tmp_path, capfd):
    rows = zlib.compress(bytes(20 * 21))
    header = struct.pack('>IIBBBBB', 20, 20, 8, 0, 0, 0, 0)
    for parts, sentence in (([(b'IDAT', rows)], 'in its header'), ([(b'IHDR', header[:9]), (b'IDAT', rows)], 'in its header'),
                            ([(b'IHDR', header)], 'rows of pixels are missing'),
                            ([(b'IHDR', header), (b'IDAT', b'no stream')], 'rows of pixels are missing'),
                            ([(b'IHDR', header), (b'IDAT', rows[:-2])], 'rows of pixels are missing'),
                            ([(b'IHDR', header), (b'acTL', b''), (b'IDAT', rows)], 'is an animation')):
        (tmp_path / 'a.png').write_bytes(b'\x89PNG\r\n\x1a\n' + b''.join(chunk(*part) for part in [*parts, (b'IEND', b'')]))
        with pytest.raises(ValueError, match=rf'a\.png .*{sentence}'):
            read_image(tmp_path / 'a.png')
    assert capfd.readouterr().err == ''


@some
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from(['.png', '.tif', '.bmp']),
       st.sampled_from([np.uint8, np.uint16]), st.booleans(), st.integers(0, 99))
def test_what_is_written_is_read(tmp_path, height, width, suffix, dtype, colour, seed):
    dtype = np.uint8 if suffix == '.bmp' else dtype
    image = noise(seed, (height, width, 3) if colour else (height, width), dtype)
    write_image(tmp_path / f'a{suffix}', image)
    assert np.array_equal(read_image(tmp_path / f'a{suffix}', color=True, quiet=True), image)


# --- orientation, ranges, threads ------------------------------------------------------------------------------------

@pytest.mark.parametrize('suffix', ['.png', '.jpg', '.tif'])
def test_orientation_is_obeyed_alike_in_all_formats(tmp_path, suffix):
    stored = np.zeros((40, 64), np.uint8)
    stored[:20, :32] = 250
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        picture = Image.fromarray(stored)
        picture.save(tmp_path / f'a{suffix}', **({'tiffinfo': {274: orientation}} if suffix == '.tif' else {'exif': exif}))
        reference = Image.fromarray(stored)
        reference.getexif()[274] = orientation
        from PIL import ImageOps
        expected = np.asarray(ImageOps.exif_transpose(reference))
        found = read_image(tmp_path / f'a{suffix}')
        assert found.shape == expected.shape and np.abs(found.astype(int) - expected).max() <= 5, orientation


def test_orientation_is_found_behind_other_notes():
    exif = Image.Exif()
    exif[274] = 6
    data, xmp = encoded(noise(), 'JPEG', exif=exif), b'http://ns.adobe.com/xap/1.0/\0<x/>'
    noted = data[:2] + struct.pack('>HH', 0xFFE1, len(xmp) + 2) + xmp + data[2:]
    assert np.array_equal(decode_jpeg(noted), decode_jpeg(data)) and decode_jpeg(data).shape == noise().T.shape


def test_twelve_bits_in_sixteen(tmp_path):
    image = np.linspace(0, 4080, 400).reshape(20, 20).astype(np.uint16)
    write_image(tmp_path / 'a.png', image)
    with pytest.warns(UserWarning, match=r'a\.png: the largest value is 4080 of 65535.*value_range=\(0, 4095\)'):
        read_image(tmp_path / 'a.png')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        mapped = read_image(tmp_path / 'a.png', value_range=(0, 4080))
        assert np.abs(mapped - image / 4080).max() < 1e-6 and mapped.max() == 1
        read_image(tmp_path / 'a.png', quiet=True)
        write_image(tmp_path / 'b.png', (image * 16).astype(np.uint16))
        read_image(tmp_path / 'b.png')
        write_image(tmp_path / 'c.png', np.zeros((9, 9), np.uint16))
        read_image(tmp_path / 'c.png')
    for bad in ((5, 5), (9, 2), (0, np.nan), (0, np.inf)):
        with pytest.raises(ValueError, match='A range of values'):
            read_image(tmp_path / 'a.png', value_range=bad)
    with pytest.raises(ValueError, match='NaN'):
        window(np.array([np.nan]), 0, 1)


def test_threads_change_nothing_of_the_process(tmp_path):
    for number in range(8):
        tifffile.imwrite(tmp_path / f'{number}.tif', noise(number, (64, 64)), compression='zlib')
        (tmp_path / f'{number}.jpg').write_bytes(encoded(head(), 'JPEG')[:900])
    filters, level = list(warnings.filters), cv2.utils.logging.getLogLevel()

    def read(number):
        try:
            return read_image(tmp_path / f'{number // 2 % 8}.{"tif" if number % 2 else "jpg"}')
        except ValueError:
            return None
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(200)))
    assert warnings.filters == filters and cv2.utils.logging.getLogLevel() == level


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_depth_survives_the_way_through_floats(dtype):
    every = np.arange(np.iinfo(dtype).max + 1).astype(dtype)
    assert to_float(every).dtype == np.float32 and to_float(every).max() == 1
    assert np.array_equal(to_depth(to_float(every), dtype), every)


def test_floats_that_are_no_greys():
    for bad in (np.array([0, np.nan]), np.array([0, 1.5]), np.array([1, 2])):
        with pytest.raises(ValueError, match=r'in \[0, 1\]'):
            to_float(bad)
    with pytest.raises(ValueError, match='empty'):
        to_float(np.zeros((0, 4)))
    with pytest.raises(ValueError, match='NaN'):
        to_depth(np.array([0, np.nan]), np.uint8)
    with pytest.raises(ValueError, match='uint8 or uint16'):
        to_depth(np.array([0.]), np.int32)


# --- names and links -------------------------------------------------------------------------------------------------

def test_names():
    assert [stem_of(name) for name in ('34010.png', 'a.b010.TIFF', '.png', 'notes')] == ['34010', 'a.b010', '', 'notes']
    assert suffix_of('x.JPEG') == '.jpeg' and suffix_of('png') == ''


def test_the_name_that_was_given_decides(tmp_path):
    (tmp_path / 'blobs').mkdir()
    write_image(tmp_path / 'a.png', noise())
    (tmp_path / 'a.png').rename(tmp_path / 'blobs/aa11')  # as DVC and hub caches store files
    (tmp_path / 'CT').mkdir()
    (tmp_path / 'CT/34010.png').symlink_to('../blobs/aa11')
    (tmp_path / 'linked').symlink_to('CT')
    assert np.array_equal(read_image(tmp_path / 'CT/34010.png'), noise())
    (tmp_path / 'MRI').mkdir()
    write_image(tmp_path / 'MRI/34010.png', noise())
    pair, = list_pairs(tmp_path / 'linked', tmp_path / 'MRI')
    assert pair.ct == tmp_path / 'linked/34010.png' and pair.name == '34010.png'
    write_image(tmp_path / 'CT/34010.png', noise(1))  # replaces the link, not what others link to
    assert not (tmp_path / 'CT/34010.png').is_symlink() and (tmp_path / 'blobs/aa11').exists()
    assert np.array_equal(read_image(tmp_path / 'CT/34010.png'), noise(1))


def test_absolute_path(tmp_path, monkeypatch):
    (tmp_path / 'far/away').mkdir(parents=True)
    (tmp_path / 'link').symlink_to('far/away')
    monkeypatch.chdir(tmp_path)
    assert absolute_path('link') == tmp_path / 'link' and absolute_path('nbs/../x') == tmp_path / 'x'
    assert absolute_path('link/..') == tmp_path / 'far'  # as the kernel sees it
    monkeypatch.setenv('HOME', str(tmp_path))
    assert absolute_path('~/x') == tmp_path / 'x'
    for bad, sentence in (('', 'An empty path'), ('  ', 'An empty path'), ('~nobody-of-this-name/x', 'names a home folder')):
        with pytest.raises(ValueError, match=sentence):
            absolute_path(bad)


def make(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        write_image(folder / name, noise())
    return folder


def test_what_is_not_a_slice_does_not_count(tmp_path):
    folder = make(tmp_path / 'CT', '1001.png', '1000.png')
    for name in ('.DS_Store', '._1000.png', 'Thumbs.db', 'README.md', '.1000.png.77.tmp'):
        (folder / name).write_text('clutter')
    (folder / '1002.png').mkdir()
    (folder / '.ipynb_checkpoints').mkdir()
    assert [path.name for path in list_images(str(folder))] == ['1000.png', '1001.png']
    (folder / '1003.png').symlink_to('nowhere')  # counts: it is meant to be a slice
    assert list_images(folder)[-1].name == '1003.png'


def test_missing_empty_and_false_folders(tmp_path):
    good = make(tmp_path / 'good', '1000.png')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'file').write_text('no folder')
    (tmp_path / 'loop').symlink_to('loop')
    make(tmp_path / 'nested/P1', '1000.png'), (tmp_path / 'nested/P0').mkdir()
    for name, error, sentence in (('none', FileNotFoundError, 'There is no folder'), ('empty', ValueError, 'holds no slice .*; fill it'),
                                  ('nested', ValueError, 'holds no slice .*; slices lie in P1 there'),
                                  ('file', ValueError, 'is no folder'), ('loop', FileNotFoundError, 'is a link to')):
        for folders in ((tmp_path / name, good), (good, tmp_path / name)):
            with pytest.raises(error, match=sentence) as caught:
                list_pairs(*folders)
            assert str(tmp_path / name) in str(caught.value)


def test_lonely_slices_are_named(tmp_path):
    ct, mri = make(tmp_path / 'CT', '1000.png', '1001.png'), make(tmp_path / 'MRI', '1000.tif', '1001.png', '1002.png')
    with pytest.raises(ValueError) as caught:
        list_pairs(ct, mri)
    assert str(caught.value) == (
        f'CT slice 1000.png has no MRI slice of the same name in {mri}; remove it or add the MRI. '
        f'MRI slice 1000.tif has no CT slice of the same name in {ct}; remove it or add the CT. '
        f'MRI slice 1002.png has no CT slice of the same name in {ct}; remove it or add the CT.')
    make(mri, *(f'{number}.png' for number in range(2000, 2010)))
    with pytest.raises(ValueError, match='The same holds for 10 more slices'):
        list_pairs(ct, mri)


def test_names_that_people_cannot_tell_apart_pair(tmp_path):
    ct = make(tmp_path / 'CT', '1000.PNG', 'M\u00e4rz_010.png')
    mri = make(tmp_path / 'MRI', '1000.png', 'Ma\u0308rz_010.png')
    assert [pair.name for pair in list_pairs(ct, mri)] == ['1000.PNG', 'M\u00e4rz_010.png']
    assert read_pair(list_pairs(ct, mri)[1])[0].shape == (24, 20)


def test_a_slice_that_is_not_named_like_the_others_is_told(tmp_path):
    "Where names tell their kind, slices without the word were left out, without a word."
    ct, mri = make(tmp_path / 'CT', '1000_CT.png', '1001_CT.png', '1002.png', '1003_MRI.png'), make(tmp_path / 'MRI', '1000_MRI.png', '1001_MRI.png')
    rows, faults = match_images({'CT': ct, 'MRI': mri})
    assert list(rows) == ['1000.png', '1001.png'] and list(faults) == ['1002.png', '1003_MRI.png']
    with pytest.raises(ValueError, match=r'CT slice 1002\.png in .*CT is not named \{name\}_CT as the others are; rename it or move it away\. CT slice 1003'):
        list_pairs(ct, mri)
    assert len(list_pairs(ct / '{name}_CT', mri / '{name}_MRI')) == 2      # who says how they are named means these
    one = make(tmp_path / 'one', '1_CT.png', '1_MRI.png', 'T1-2.png', '2_T1.png')
    assert list(match_images({'CT': one, 'MRI': one})[1]) == ['2_T1.png', 'T1-2.png']
    assert match_images({'CT': make(tmp_path / 'two', '1_CT.png', '1_MRI.png'), 'MRI': tmp_path / 'two'})[1] == {}


def test_each_further_name_costs_the_same(tmp_path):
    "Two folders of a hundred thousand names: the calls of pairing them, of Python and of the system, grow as their number does."
    def calls(many):
        for side in ('CT', 'MRI'):
            (tmp_path / f'{many}' / side).mkdir(parents=True)
            for number in range(many):
                (tmp_path / f'{many}' / side / f'{number:04d}.png').touch()
        counted = collections.Counter()
        sys.setprofile(lambda frame, event, what: counted.update([event]))
        try:
            rows, faults = match_images({'CT': tmp_path / f'{many}/CT', 'MRI': tmp_path / f'{many}/MRI'})
        finally:
            sys.setprofile(None)
        assert len(rows) == many and not faults
        return counted['call'] + counted['c_call']
    calls(10)       # what is made once
    one, two, four = map(calls, (100, 200, 400))
    assert 1.99 < (four - two) / (two - one) < 2.01


def test_two_files_of_one_slice_are_a_sentence(tmp_path):
    ct, mri = make(tmp_path / 'CT', '1000.png', '1000.tif', '1001.png'), make(tmp_path / 'MRI', '1000.png', '1001.png')
    with pytest.raises(ValueError, match=r'CT 1000\.png and 1000\.tif in .*CT are the same slice; remove or rename one'):
        list_pairs(ct, mri)
    rows, faults = match_images({'fused': mri, 'CT': ct}, by_stem=True)
    assert list(rows) == ['1001.png'] and '1000.png' in faults  # the others are not stopped


def test_stems_match_over_formats(tmp_path):
    fused, ct = make(tmp_path / 'out', '1000.png'), make(tmp_path / 'CT', '1000.tif', '1001.tif')
    assert match_images({'fused': fused, 'CT': ct}, by_stem=True)[0] == {'1000.png': [fused / '1000.png', ct / '1000.tif']}


# --- writing ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('image', [np.zeros((4, 4)), np.zeros((4, 4), bool), np.zeros((4, 4, 4), np.uint8),
                                   np.zeros((1, 4, 4), np.uint8), np.zeros(4, np.uint8), np.zeros((0, 4), np.uint8)])
def test_what_is_no_slice_is_not_written(tmp_path, image):
    with pytest.raises(ValueError, match='needs a uint8 or uint16 array'):
        write_image(tmp_path / 'a.png', image)
    assert tree(tmp_path) == []


def test_writing_needs_a_folder_a_known_suffix_and_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='make it first'):
        write_image(tmp_path / 'none/a.png', noise())
    with pytest.raises(ValueError, match='does not end in'):
        write_image(tmp_path / 'a.gif', noise())
    (tmp_path / 'a.png').mkdir()
    with pytest.raises(FileExistsError, match='is not a file'):
        write_image(tmp_path / 'a.png', noise())
    assert tree(tmp_path) == ['a.png']


def test_long_names(tmp_path):
    for name in ('x' * 251 + '.png', 'ä' * 125 + '.png'):
        write_image(tmp_path / name, noise())
        assert np.array_equal(read_image(tmp_path / name), noise())
    assert len(tree(tmp_path)) == 2
    with pytest.raises(OSError, match='too long'):
        write_image(tmp_path / ('x' * 252 + '.png'), noise())


def test_threads_that_write_one_file(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: write_image(tmp_path / 'a.png', noise(seed, (60, 60))), range(40)))
    assert tree(tmp_path) == ['a.png'] and read_image(tmp_path / 'a.png').shape == (60, 60)


@pytest.mark.fault('every file', 'killed, and what it left')
def test_what_killed_writers_left_is_cleared(tmp_path):
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    dead = [tmp_path / f'.34010.png.{ended.pid}.tmp', tmp_path / f'.x.{ended.pid}-{files._machine()}-77.tmp']
    kept = [tmp_path / f'.34011.png.{os.getpid()}.tmp', tmp_path / f'.a.{ended.pid}-0000-7.tmp', tmp_path / '.mine.tmp',
            tmp_path / f'.b.{os.getppid()}.tmp']
    for path in dead + kept:
        path.write_bytes(b'half')
    (tmp_path / f'.c.{ended.pid}.tmp').mkdir()
    write_image(tmp_path / '34010.png', noise())
    assert tree(tmp_path) == sorted(['34010.png', f'.c.{ended.pid}.tmp', *(path.name for path in kept)])
    assert clear_abandoned(tmp_path) == []


@pytest.mark.fault('every folder', 'killed between two writes', points=3)
@pytest.mark.parametrize('moment', ['filling', 'before', 'after'])
def test_a_folder_is_whole_or_absent(tmp_path, moment):
    "The next writer of the same folder clears what a killed one left, and nobody else's."
    def killed():
        def dies(*given, real=os.replace):
            if moment == 'after':
                real(*given)
            os._exit(9)
        with whole_folder(tmp_path / 'a/study') as folder:
            (folder / 'half').write_bytes(b'half')
            if moment == 'filling':
                os._exit(9)
            (folder / 'rest').write_bytes(b'rest')
            files.os.replace = dies
    (tmp_path / f'.study.{os.getppid()}.tmp').mkdir()
    (tmp_path / '.study.mine.tmp').mkdir()
    assert os.waitstatus_to_exitcode(in_child(killed)) == 9
    made = tmp_path / 'a/study'
    assert not made.exists() or tree(made) in ([], ['half', 'rest'])
    if not made.exists() or not tree(made):
        with whole_folder(tmp_path / 'a/study') as folder:
            (folder / 'half').write_bytes(b'new')
    assert [name for name in tree(tmp_path) if name.count('.')] == sorted([f'.study.{os.getppid()}.tmp', '.study.mine.tmp'])


@pytest.mark.fault('every folder', 'several at once')
def test_a_folder_that_another_one_made_meanwhile_stays(tmp_path):
    def other():
        with whole_folder(tmp_path / 'study') as quick:
            (quick / 'a').write_text('quick')
    with pytest.raises(FileExistsError, match='is there already and not empty'), whole_folder(tmp_path / 'study') as slow:
        (slow / 'a').write_text('slow')
        assert in_child(other) == 0
    assert tree(tmp_path) == ['study', 'study/a'] and (tmp_path / 'study/a').read_text() == 'quick'


def test_the_place_of_a_disk_is_no_place_for_a_new_folder(tmp_path, monkeypatch):
    "As a volume of a container: that was told at the end of the work, as a device that is busy, by the name of a hidden folder."
    (tmp_path / 'volume').mkdir()
    monkeypatch.setattr(os.path, 'ismount', lambda path: str(path) == f'{tmp_path}/volume')
    (tmp_path / 'link').symlink_to('volume')
    for place in ('volume', 'link'):
        with pytest.raises(FileExistsError, match=f'{place} is where a disk is mounted, whose place no folder can take; name a new folder in it'):
            with whole_folder(tmp_path / place):
                pytest.fail('work for nothing')
    (tmp_path / 'volume/empty').mkdir()
    (tmp_path / 'out').symlink_to('volume/empty')
    with whole_folder(tmp_path / 'out') as folder:
        assert folder.parent == tmp_path / 'volume', 'made on the disk where it is to lie, for from another it cannot be moved at once'
        (folder / 'a').write_text('a')
    assert tree(tmp_path) == ['link', 'out', 'volume', 'volume/empty', 'volume/empty/a']


def test_a_folder_where_none_can_be(tmp_path, monkeypatch):
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'gone').symlink_to('nowhere')
    (tmp_path / 'loop').symlink_to('loop')
    (tmp_path / 'real').mkdir()
    (tmp_path / 'link').symlink_to('real')
    monkeypatch.chdir(tmp_path)
    for place in ('file', 'file/a', 'gone', 'gone/a', 'loop', '.', tmp_path.parent):
        with pytest.raises(FileExistsError), whole_folder(place):
            raise AssertionError('never begun')
    with whole_folder('link') as folder:
        (folder / 'a').write_text('a')
    assert (tmp_path / 'link').is_symlink() and (tmp_path / 'real/a').is_file()


@pytest.mark.fault('every file', 'disk full, or failing')
def test_no_space_left(tmp_path):
    path = tmp_path / 'a.png'
    write_image(path, noise(1, (10, 10)))
    before = path.read_bytes()
    message = in_little_space(write_image, path, noise(2, (99, 99)))
    assert message.startswith(f'[Errno 27] {path} could not be written (File too large); nothing was changed.')
    assert tree(tmp_path) == ['a.png'] and path.read_bytes() == before
    log = tmp_path / 'log'
    append_line(log, 'x' * 2000)
    message = in_little_space(append_line, log, 'y' * 2000)
    assert message.startswith(f'[Errno 27] {log} could not take one more line')
    assert read_lines(log) == ['x' * 2000] and log.stat().st_size == 2001


def read_lines(path):
    "The whole lines of a file that grows by `append_line`; none if there is no file."
    return path.read_text().split('\n')[:-1] if path.exists() else []


def test_a_name_that_is_in_its_prefix_too(tmp_path):
    for side, word in (('CT', 'CT'), ('MRI', 'T1')):
        (tmp_path / side).mkdir()
        for i in (1, 2, 3):
            write_image(tmp_path / side / f'{word}_{i}.png', noise(i))
    assert [pair.name for pair in list_pairs(tmp_path / 'CT', tmp_path / 'MRI')] == ['1.png', '2.png', '3.png']


class Dead(BaseException):
    "The process is no more: nothing after this runs, no cleaning up either."


class Shim:
    "`os`, whose calls that change the disk stop before the call number `fatal`; `half` writes half of the data there."

    def __init__(self, fatal, half=False):
        self.fatal, self.half, self.calls, self.opened = fatal, half, [], set()

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ('open', 'write', 'fsync', 'close', 'replace', 'unlink', 'ftruncate', 'lseek', 'read'):
            return real

        def call(*arguments):
            if len(self.calls) >= self.fatal:
                if self.half and name == 'write' and len(self.calls) == self.fatal:
                    os.write(arguments[0], bytes(arguments[1])[:len(arguments[1]) // 2])
                self.calls.append(name)
                raise Dead
            self.calls.append(name)
            answer = real(*arguments)
            if name == 'open':
                self.opened.add(answer)
            if name == 'close':
                self.opened.discard(arguments[0])
            return answer
        return call


def survives(monkeypatch, action, check):
    "Kills `action` before each of its system calls, and in the middle of its writes; `check` looks each time."
    for fatal, half in itertools.product(range(40), (False, True)):
        shim = Shim(fatal, half)
        monkeypatch.setattr(files, 'os', shim)
        try:
            action()
            ended = True
        except Dead:
            ended = False
        monkeypatch.undo()
        for file in shim.opened:
            os.close(file)  # as the system does, and with it the locks
        check(ended)
        if ended:
            return shim.calls
    raise AssertionError('it never ends')


@pytest.mark.fault('every file', 'killed between two system calls')
def test_a_crash_between_any_two_system_calls_of_writing(tmp_path, monkeypatch, record_property):
    path = tmp_path / 'a.json'

    def check(ended):
        assert path.read_bytes() in ({b'new' * 9} if ended else {b'old', b'new' * 9})
        write_atomically(path, b'old')  # the next writer is not disturbed
        for left in tmp_path.glob('.*.tmp'):
            left.unlink()
    write_atomically(path, b'old')
    calls = survives(monkeypatch, lambda: write_atomically(path, b'new' * 9), check)
    record_property('points', 2 * len(calls))
    assert calls == ['open', 'write', 'fsync', 'close', 'replace', 'unlink']


@pytest.mark.fault('every log', 'killed between two system calls')
def test_a_crash_between_any_two_system_calls_of_appending(tmp_path, monkeypatch, record_property):
    path = tmp_path / 'log'
    path.write_bytes(b'first\ntor')

    def check(ended):
        lines = read_lines(path)
        assert lines[0] == 'first' and lines[1:] in ([[b'second'.decode()]] if ended else [[], ['second']])
        append_line(path, 'third')
        assert read_lines(path) == [*lines, 'third']
        path.write_bytes(b'first\ntor')
    calls = survives(monkeypatch, lambda: append_line(path, 'second'), check)
    record_property('points', 2 * len(calls))
    assert calls.count('write') == 1 and calls.index('fsync') > calls.index('write') and 'ftruncate' in calls


@pytest.mark.fault('every file', 'disk full, or failing')
@pytest.mark.parametrize('fault', [errno.ENOSPC, errno.EIO])
def test_a_fault_at_any_system_call_is_a_sentence_and_leaves_what_was(tmp_path, monkeypatch, fault):
    path, log = tmp_path / 'a.json', tmp_path / 'log'
    write_atomically(path, b'old')
    append_line(log, 'first')
    for name in ('open', 'write', 'fsync', 'replace'):
        shim = Shim(99)
        setattr(shim, name, lambda *arguments: (_ for _ in ()).throw(OSError(fault, os.strerror(fault))))
        monkeypatch.setattr(files, 'os', shim)
        with pytest.raises(OSError, match=rf'a\.json could not be written \({os.strerror(fault)}\)'):
            write_atomically(path, b'new')
        if name != 'replace':
            with pytest.raises(OSError, match=rf'log could not take one more line \({os.strerror(fault)}\)'):
                append_line(log, 'second')
        monkeypatch.undo()
        assert path.read_bytes() == b'old' and read_lines(log) == ['first'] and tree(tmp_path) == ['a.json', 'log']


@pytest.mark.fault('every log', 'several at once')
def test_many_writers_of_one_log(tmp_path):
    script = ('import sys; from medfusion.files import append_line\n'
              'for i in range(50): append_line(sys.argv[1], f"{sys.argv[2]} {i} " + "x" * 300)')
    running = [subprocess.Popen([sys.executable, '-c', script, tmp_path / 'log', str(number)]) for number in range(3)]
    assert [process.wait() for process in running] == [0, 0, 0]
    lines = read_lines(tmp_path / 'log')
    assert len(lines) == 150 and all(line.endswith(' ' + 'x' * 300) for line in lines)
    for number in range(3):
        assert [line.split()[1] for line in lines if line.startswith(f'{number} ')] == [str(i) for i in range(50)]


def test_a_log_takes_one_line_at_a_time(tmp_path):
    for text in ('a\nb', 'a\r'):
        with pytest.raises(ValueError, match='one line at a time'):
            append_line(tmp_path / 'log', text)
    assert read_lines(tmp_path / 'log') == []
    with pytest.raises(OSError, match='could not take one more line'):
        append_line(tmp_path / 'none/log', 'a')


# --- records ---------------------------------------------------------------------------------------------------------

def test_records(tmp_path):
    content = {'size': (3, 4), 'mean': np.float64('nan'), 'path': tmp_path, 'tensor': torch.ones(2), 1: {2}, 'ä': None}
    assert read_json(write_json(tmp_path / 'a.json', content)) == {
        'size': [3, 4], 'mean': None, 'path': str(tmp_path), 'tensor': [1, 1], '1': [2], 'ä': None}
    for text, sentence in (('[]', 'holds no JSON object but a list'), ('{"a": ', 'is not JSON'), ('', 'is not JSON'),
                           ('[' * 100000, 'is not JSON'), ('null', 'holds no JSON object')):
        (tmp_path / 'b.json').write_text(text)
        with pytest.raises(ValueError, match=sentence) as caught:
            read_json(tmp_path / 'b.json')
        assert str(tmp_path / 'b.json') in str(caught.value)
    (tmp_path / 'b.json').write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match='is not JSON'):
        read_json(tmp_path / 'b.json')
    with pytest.raises(FileNotFoundError, match=r'There is no file .*c\.json'):
        read_json(tmp_path / 'c.json')


@some
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
                    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)))
def test_whatever_is_recorded_can_be_read(tmp_path, value):
    written = plain({'value': value})
    assert read_json(write_json(tmp_path / 'a.json', {'value': value})) == written
    assert json.loads(json.dumps(written, allow_nan=False)) == written


def test_no_locks_on_this_system(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'fcntl', None)  # as on Windows
    append_line(tmp_path / 'log', 'a')
    assert read_lines(tmp_path / 'log') == ['a'] and threading.active_count() >= 1


def test_no_locks_on_this_disk(tmp_path, monkeypatch):
    import fcntl
    def fails(file, kind):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, 'flock', fails)
    monkeypatch.setattr(errno, 'ENOTSUP', 45)       # as on macOS, where it is another than EOPNOTSUPP
    lacking = errno.ENOSYS, errno.ENOLCK, 45        # a Lustre that was mounted without flock; an NFS without its lock daemon; a disk of Windows on a Mac
    for number in lacking:
        files._without_locks.cache_clear()
        with pytest.warns(UserWarning, match='has no locks .*one process at a time'):
            append_line(tmp_path / 'log', str(number))
    number = errno.EIO
    with pytest.raises(OSError, match='could not take one more line'):
        append_line(tmp_path / 'log', 'c')
    assert read_lines(tmp_path / 'log') == [*map(str, lacking)]


def test_a_name_that_is_no_text_and_one_folder_for_both_are_told(tmp_path):
    write_image(tmp_path / '7001.png', np.zeros((16, 16), np.uint8))
    with pytest.raises(ValueError, match=f'{tmp_path} is given for CT and MRI, .* give a folder for each'):
        list_pairs(tmp_path, tmp_path)
    os.replace(tmp_path / '7001.png', os.fsencode(tmp_path / '7001.png').replace(b'7001', b'\xe9t\xe9001'))
    with pytest.raises(ValueError, match=r"'\\udce9t\\udce9001.png' in .* is not UTF-8; rename it"):
        list_images(tmp_path)


def test_free_space_is_advised_where_that_is_what_lacks(tmp_path, monkeypatch):
    def fails(*given):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr('medfusion.files.write_synced', fails)
    for number, advice in ((errno.ENOSPC, 'Free some space or choose another folder'), (errno.ENOENT, 'nothing was changed. Choose another folder')):
        with pytest.raises(OSError, match=advice):
            write_atomically(tmp_path / 'a', b'a')


def test_a_read_only_disk_is_told_by_the_name_of_the_file(tmp_path, monkeypatch):
    "Where nothing can be written, removing what is not there fails as well: that was told, by the name of a hidden file."
    def refuse(path, *arguments, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
    with monkeypatch.context() as disk:
        for name in ('open', 'unlink'):
            disk.setattr(os, name, refuse)
        with pytest.raises(OSError, match=r'/x\.csv could not be written \(Read-only file system\); nothing was changed\. Choose another folder'):
            write_atomically(tmp_path / 'x.csv', b'')


def test_a_pet_of_a_pet_ct_is_no_ct_beside_an_mri():
    for first, second in (('MRI', 'PET-CT'), ('t1.png', 'spect_ct.png'), ('PET', 'CT'), ('pet_ct', 'mri')):
        files.check_order(first, second)
    with pytest.raises(ValueError, match='MRI_PET is an MRI and CT a CT'):
        files.check_order('MRI_PET', 'CT')
